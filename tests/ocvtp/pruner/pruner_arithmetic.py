"""The authors' arithmetic, rebuilt from its description in plain loops over float64, under the authors' names.

Nothing here comes from ocvtp: what agrees with it was written twice.
"""

import math

import numpy as np

EPS_NORM = 1e-5


def norm(x, weight, bias=0.0):
    """Layer norm of one vector."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / math.sqrt(variance + EPS_NORM) * weight + bias


def gelu(x):
    return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def encode(w, token):
    x = norm(token, w["encode_project.mlp.0.weight"], w["encode_project.mlp.0.bias"])
    x = gelu(w["encode_project.mlp.1.weight"] @ x + w["encode_project.mlp.1.bias"])
    return w["encode_project.mlp.4.weight"] @ x + w["encode_project.mlp.4.bias"]


def gru(w, x, h):
    size = len(h)
    gi = w["aggregat.gru.weight_ih"] @ x + w["aggregat.gru.bias_ih"]
    gh = w["aggregat.gru.weight_hh"] @ h + w["aggregat.gru.bias_hh"]
    reset = sigmoid(gi[:size] + gh[:size])
    update = sigmoid(gi[size : 2 * size] + gh[size : 2 * size])
    new = np.tanh(gi[2 * size :] + reset * gh[2 * size :])
    return (1 - update) * new + update * h


def iterate(w, slots, keys, values):
    """One iteration of slot attention: new slots and attention [slots, tokens]."""
    width = slots.shape[1]
    logits = np.zeros((len(slots), len(keys)))
    for s, slot in enumerate(slots):
        q = w["aggregat.proj_q.weight"] @ norm(slot, w["aggregat.norm_slots_0.weight"], w["aggregat.norm_slots_0.bias"])
        for t, key in enumerate(keys):
            logits[s, t] = q @ key / math.sqrt(width)
    attention = np.stack([softmax(logits[:, t]) for t in range(len(keys))], axis=1)
    out = np.zeros_like(slots)
    for s, slot in enumerate(slots):
        mass = sum(attention[s]) + 1e-5
        update = sum(attention[s, t] / mass * values[t] for t in range(len(keys)))
        x = gru(w, update, slot)
        y = norm(x, w["aggregat.norm_slots_1.weight"], w["aggregat.norm_slots_1.bias"])
        y = gelu(w["aggregat.ffn.mlp.0.weight"] @ y + w["aggregat.ffn.mlp.0.bias"])
        out[s] = x + w["aggregat.ffn.mlp.3.weight"] @ y + w["aggregat.ffn.mlp.3.bias"]
    return out, attention


def keys_values(w, tokens):
    x = [norm(encode(w, t), w["aggregat.norm_in.weight"], w["aggregat.norm_in.bias"]) for t in tokens]
    return [w["aggregat.proj_k.weight"] @ t for t in x], [w["aggregat.proj_v.weight"] @ t for t in x]


def slot_attention(w, tokens, queries, iterations=3):
    """Slots and the attention of the last iteration."""
    keys, values = keys_values(w, tokens)
    slots, attention = queries, None
    for _ in range(iterations):
        slots, attention = iterate(w, slots, keys, values)
    return slots, attention


def attend(w, name, x, memory, heads):
    """Multi-head attention without biases."""
    width = x.shape[1]
    head = width // heads
    packed = w[f"{name}.in_proj_weight"]
    q, k, v = x @ packed[:width].T, memory @ packed[width : 2 * width].T, memory @ packed[2 * width :].T
    out = np.zeros_like(x)
    for h in range(heads):
        cut = slice(h * head, (h + 1) * head)
        for t in range(len(x)):
            weights = softmax(np.array([q[t, cut] @ k[m, cut] for m in range(len(memory))]) / math.sqrt(head))
            out[t, cut] = sum(weights[m] * v[m, cut] for m in range(len(memory)))
    return out @ w[f"{name}.out_proj.weight"].T


def decode(w, tokens, slots, permutation, visible, *, heads, layers):
    """The random auto-regressive decoder as published: shuffle, hide all but the first few, decode, unshuffle.

    `permutation` None is evaluation: no shuffle, nothing hidden.
    """
    order = list(range(len(tokens))) if permutation is None else list(permutation)
    shown = len(tokens) if permutation is None else visible
    place = w["decode.posit_embed._pe"][0]
    x = np.zeros_like(tokens)
    for rank, index in enumerate(order):
        told = norm(
            w["decode.project1.project.weight"] @ tokens[index],
            w["decode.project1.norm.weight"], w["decode.project1.norm.bias"],
        )  # fmt: skip
        x[rank] = (told if rank < shown else w["decode.mask_token"][0, 0]) + place[index]
    memory = np.stack([
        norm(w["decode.project2.project.weight"] @ slot, w["decode.project2.norm.weight"],
             w["decode.project2.norm.bias"])
        for slot in slots
    ])  # fmt: skip
    x = np.stack([norm(row, w["decode.norm0.weight"]) for row in x])
    for number in range(layers):
        name = f"decode.backbone.layers.{number}"
        y = x if number == 0 else np.stack([norm(row, w[f"{name}.norm1.weight"]) for row in x])
        x = x + attend(w, f"{name}.self_attn", y, y, heads)
        y = np.stack([norm(row, w[f"{name}.norm2.weight"]) for row in x])
        x = x + attend(w, f"{name}.multihead_attn", y, memory, heads)
        y = np.stack([norm(row, w[f"{name}.norm3.weight"]) for row in x])
        x = x + np.stack([w[f"{name}.linear2.weight"] @ gelu(w[f"{name}.linear1.weight"] @ row) for row in y])
    out = np.zeros_like(x)
    for rank, index in enumerate(order):
        out[index] = x[rank]
    return out


def aw_mse(prediction, target, attention, power=0.5, cap=10.0):
    """Area-weighted squared error of one image, as in the authors' code."""
    slots, tokens = attention.shape
    area = [0] * slots
    for t in range(tokens):
        area[int(np.argmax(attention[:, t]))] += 1
    weights = [max(a / tokens, 1e-8) ** -power for a in area]
    mean = sum(weights) / slots
    weights = [min(weight / mean, 10.0 if cap is None else cap) for weight in weights]
    above = below = 0.0
    for t in range(tokens):
        omega = sum(attention[s, t] * weights[s] for s in range(slots))
        error = sum((prediction[t] - target[t]) ** 2) / len(target[t])
        above, below = above + omega * error, below + omega
    return above / below


def select(attention, budget, top_k, received):
    """Kept patches of one image, as in the authors' code: a set with CLS as 0, cut off, then filled."""
    picks = set()
    for row in attention:
        for t in sorted(range(len(row)), key=lambda t: -row[t])[:top_k]:
            picks.add(t + 1)
    picks.add(0)
    target = budget + 1
    if len(picks) > target:
        picks = set(list(picks)[:target])
    for t in sorted(range(attention.shape[1]), key=lambda t: -received[t]):
        if len(picks) < target:
            picks.add(t + 1)
    return sorted(t - 1 for t in picks if t)
