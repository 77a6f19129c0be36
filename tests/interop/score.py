"""score.py: the loss per scored token that transformers and peft find. Reads JSON, a list of
[folder, model, token file] with both paths relative to the folder; prints the list of losses.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gold"))

from check_export import load, loss_of  # noqa: E402


def main():
    models, losses = {}, []
    for folder, model, tokens in json.load(sys.stdin):
        os.chdir(folder)  # an adapter names its base relative to where it was trained
        if (folder, model) not in models:
            models = {(folder, model): load(Path(model))}  # one at a time
        losses.append(loss_of(models[folder, model], tokens))
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
