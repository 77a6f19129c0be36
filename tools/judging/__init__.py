"""judging: the parts of judge.py: prompts, engines, verdicts, intervals, records, reports."""
