"""The reference computations: transformers models in float64, both objectives, and their checks."""

import copy
import dataclasses
import math

import torch
import torch.nn.functional as F

RHO = 1.0  # weight of the alignment gradient in the expected SafeGrad coefficients


class RmsNorm64(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Rotary64(torch.nn.Module):
    """Angles in float64 from the frequencies that transformers computed in float32."""

    def __init__(self, rotary):
        super().__init__()
        self.register_buffer("inv_freq", rotary.inv_freq.double(), persistent=False)
        self.scaling = rotary.attention_scaling

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def in_float64(model):
    """A copy of `model` that computes in float64 throughout."""
    model = copy.deepcopy(model).double()
    # The eager attention would compute its softmax in float32.
    model.set_attn_implementation("sdpa")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, RmsNorm64(child))
            elif type(child).__name__.endswith("RotaryEmbedding"):
                setattr(parent, name, Rotary64(child))
    return model.eval()


@dataclasses.dataclass
class Batch:
    tokens: list  # per sequence, i64
    scored: list  # per sequence, bool per position; the last position is never scored
    task: range
    align: range

    def count(self, sequences):
        return sum(int(self.scored[i].sum()) for i in sequences)


def logits_of(model, tokens):
    return model(input_ids=tokens[None]).logits[0]


def hidden_of(model, tokens):
    """Last hidden states, after the final norm."""
    return model.model(input_ids=tokens[None]).last_hidden_state[0]


def task_loss(model, batch):
    """Sum of the cross-entropies at the scored positions of the task sequences."""
    total = 0.0
    for i in batch.task:
        logits, scored = logits_of(model, batch.tokens[i]), batch.scored[i]
        total += F.cross_entropy(
            logits[:-1][scored[:-1]], batch.tokens[i][1:][scored[:-1]], reduction="sum")
    return total


def align_loss(model, batch, positions, reference_hidden, reference_head):
    """Sum of KL(p_ref || p_theta) at `positions` (bool per sequence) of the alignment sequences."""
    logits = torch.cat([logits_of(model, batch.tokens[i])[positions[i]] for i in batch.align])
    log_ref = F.log_softmax(reference_hidden.to(logits.dtype) @ reference_head.to(logits.dtype).T,
                            dim=-1)
    return (log_ref.exp() * (log_ref - F.log_softmax(logits, dim=-1))).sum()


def gradient(model, loss):
    """{name: gradient} of the parameters that require one."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return dict(zip([n for n, _ in named], torch.autograd.grad(loss(model), [p for _, p in named])))


def dot(x, y):
    return sum(float((x[n].double() * y[n].double()).sum()) for n in x)


def projection(u, a, n_task, n_align):
    """uu, ua, aa of the per-token means and the SafeGrad mix, from the vectors themselves."""
    u = {n: g / n_task for n, g in u.items()}
    a = {n: g / n_align for n, g in a.items()}
    uu, ua, aa = dot(u, u), dot(u, a), dot(a, a)
    c_align = RHO - min(ua, 0.0) / aa
    projected = {n: u[n] - ua / aa * a[n] if ua < 0 else u[n] for n in u}
    mix = {n: projected[n] + RHO * a[n] for n in u}
    by_coefficients = {n: u[n] + c_align * a[n] for n in u}
    error = {n: mix[n] - by_coefficients[n] for n in u}
    assert dot(error, error) < 1e-24 * dot(mix, mix)
    assert dot(projected, a) > -1e-12 * math.sqrt(uu * aa)
    return dict(uu=uu, ua=ua, aa=aa, safegrad_c_task=1.0, safegrad_c_align=c_align,
                safegrad_grad_norm=math.sqrt(dot(mix, mix)))


def close(found, expected, tolerance, what):
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert error < tolerance, f"{what}: relative error {error:.1e}, allowed {tolerance:.0e}"


def check_difference(model, loss, gradients, what):
    """Central differences at the two largest entries of three parameters."""
    parameters = dict(model.named_parameters())
    names = [n for n in gradients if gradients[n].abs().max() > 0]
    for name in (names[0], names[len(names) // 2], names[-1]):
        flat, h = parameters[name].data.view(-1), 1e-5
        for i in gradients[name].abs().flatten().topk(2).indices.tolist():
            value, sides = float(flat[i]), []
            for sign in (1, -1):
                flat[i] = value + sign * h
                with torch.no_grad():
                    sides.append(float(loss(model)))
            flat[i] = value
            found = torch.tensor((sides[0] - sides[1]) / (2 * h))
            close(found, gradients[name].flatten()[i], 1e-6, f"{what}: {name}[{i}]")


def check_llama3_scaling(model, batch):
    """The scaling has to change the logits, or the fixture would not see it left out."""
    config = copy.deepcopy(model.config)
    config.rope_scaling = None
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        change = max(
            float((logits_of(plain, t) - logits_of(model, t)).abs().max()) for t in batch.tokens)
    assert change > 0.5, f"llama3 scaling changes the logits by {change} only"
