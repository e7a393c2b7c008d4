"""Routed attention by hand: one sequence, window, expert, head and query at a time. Tests compare with it."""

import torch
from torch import Tensor

from moe_dist.attention.routed import AttentionProjections, RoutedAttention
from moe_dist.kernels.coordinate_descent.schedule import Schedule

EPS = 0.03


def descend(s: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """(scores, threshold) of one row: the papers' iteration."""
    b = -s
    for eps in Schedule().temperatures():
        a = eps * (torch.tensor(k, dtype=s.dtype).log() - ((s + b) / eps).logsumexp(0))
        b = -(s + a).relu()
    return ((s + a + b) / EPS).exp(), a


def turned(v_P: Tensor, angles_P: Tensor | None) -> Tensor:
    if angles_P is None:
        return v_P
    half = len(v_P) // 2
    c, s = angles_P.cos(), angles_P.sin()
    a, b = v_P[:half], v_P[half:]
    return torch.cat((a * c[:half] - b * s[:half], b * c[half:] + a * s[half:]))


def look(
    heads: AttentionProjections,
    x_SD: Tensor,
    t: int,
    keys: list[int],
    weights: Tensor | None,
    angles_SHP: Tensor | None,
) -> Tensor:
    """What token t gets from attention to `keys`: their values times `weights`, beside the null key if there is one."""
    width, kv = heads.head_dim, heads.key_value.weight.unflatten(0, (-1, 2, heads.head_dim))
    number, y_D = len(heads.query.weight) // width, torch.zeros_like(x_SD[0])
    for head in range(number):
        mine, group = slice(head * width, (head + 1) * width), head * len(kv) // number
        angles_SP = None if angles_SHP is None else angles_SHP[:, head % angles_SHP.shape[1]]
        at = [None if angles_SP is None else angles_SP[position] for position in (t, *keys)]
        q_P = turned(heads.query.weight[mine] @ x_SD[t], at[0])
        k = [turned(kv[group, 0] @ x_SD[j], angle) for j, angle in zip(keys, at[1:], strict=True)]
        v = [kv[group, 1] @ x_SD[j] for j in keys]
        if weights is not None:
            v = [value * weight for value, weight in zip(v, weights, strict=True)]
        if heads.null is not None:
            k, v = [heads.null[group, 0], *k], [heads.null[group, 1], *v]
        share = (torch.stack(k) @ q_P / width**0.5).softmax(0)
        y_D = y_D + (share @ torch.stack(v)) @ heads.out.weight[mine]
    return y_D


def one(y: Tensor) -> Tensor:
    return 1 + y - y.detach()


def chosen_queries(layer: RoutedAttention, s_S: Tensor, window: range, wanted: int) -> dict[int, Tensor]:
    """{place: its weight}."""
    w = layer.routed.routed_window or layer.routed.local_window
    if wanted >= w:
        return {t: torch.ones_like(s_S[0]) for t in window}
    if layer.routed.causal_routing:
        _, a = descend(s_S[window.start - w : window.start], min(wanted * 9 / 8, w))
        y = {t: ((s_S[t] + a).clamp(max=0) / EPS).exp() for t in window}
        return {t: one(y[t]) for t in [t for t in window if y[t] >= 0.5][:wanted]}
    y_w, _ = descend(s_S[window.start : window.stop], min(wanted * 9 / 8, len(window)))
    ranked = sorted(window, key=lambda t: -s_S[t].item())[:wanted]
    return {t: one(y_w[t - window.start]) for t in ranked}


def routed_by_hand(
    layer: RoutedAttention,
    x_BSD: Tensor,
    angles_SHP: Tensor | None = None,
    queries: int | None = None,
    key_values: int | None = None,
) -> Tensor:
    routed, rows = layer.routed, []
    queries, key_values = queries or routed.num_routed_queries, key_values or routed.num_routed_key_values
    w = routed.routed_window or routed.local_window
    for x_SD in x_BSD:
        length = len(x_SD)
        y = [
            look(layer.local, x_SD, t, list(range(max(t - routed.local_window, 0), t + 1)), None, angles_SHP)
            for t in range(length)
        ]
        for e, heads in enumerate(layer.experts):
            s_q, s_k = (
                scores(tokens[e], x_SD, routed.cosine_routing)
                for tokens in (layer.routers.query, layer.routers.key_value)
            )
            for start in range(w, length, w):
                window = range(start, min(start + w, length))
                y_k, _ = descend(s_k[:start], min(key_values * 9 / 8, start))
                keys = sorted(range(start), key=lambda t: -s_k[t].item())[:key_values]
                chosen = chosen_queries(layer, s_q, window, queries)
                for t in window:
                    if t in chosen:
                        y[t] = y[t] + chosen[t] * look(heads, x_SD, t, keys, one(y_k[keys]), angles_SHP)
                    else:
                        y[t] = y[t] + layer.null_tokens[e]
        if routed.average_routed and length > w:
            alone = w if routed.causal_routing else 0
            y = [value if t < alone else value / (len(layer.experts) + 1) for t, value in enumerate(y)]
        rows.append(torch.stack(y))
    return torch.stack(rows)


def scores(token_D: Tensor, x_SD: Tensor, cosine: bool) -> Tensor:
    products = x_SD @ token_D
    return 8 * products / (x_SD.norm(dim=1) * token_D.norm()) if cosine else products
