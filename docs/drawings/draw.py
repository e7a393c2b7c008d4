"""The drawings of the concept pages: python docs/drawings/draw.py writes them beside itself.

Which tokens are kept and which ranks are in a group is computed, by the rules that the package has, not drawn by hand.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from svg import COLOURS, Drawing  # noqa: E402

from moe_dist.moe.capacity import expert_capacity  # noqa: E402
from moe_dist.parallel.mesh import Layout  # noqa: E402

CHOSEN = (0, 2, 0, 1, 0, 2, 2, 3)  # by each of eight tokens, of four experts


def kept(chosen: Sequence[int], experts: int = 4, factor: float = 1.0) -> list[bool]:
    """By position: the first C that ask for an expert stay."""
    limit = expert_capacity(factor, 1, len(chosen), experts, 0)
    assert limit is not None
    return [chosen[:token].count(expert) < limit for token, expert in enumerate(chosen)]


def routing() -> Drawing:
    logits = (0.4, 2.1, -0.3, 1.5)
    whole = sum(map(math.exp, logits))
    shares = [math.exp(each) / whole for each in logits]
    best = sorted(range(4), key=lambda expert: -shares[expert])[:2]
    weight = {expert: shares[expert] / sum(shares[one] for one in best) for expert in best}
    drawn = Drawing(
        "routing", "A token is scored, sent to its two best experts, and gets back their weighted sum", 760, 262
    )
    for x, words in ((55, "token"), (225, "router: softmax(W x)"), (435, "experts"), (640, "weighted sum")):
        drawn.text(x, 18, words, 13, "soft")
    drawn.box(55, 132, "x", 46, 34)
    drawn.line(80, 132, 128, 132)
    for expert, share in enumerate(shares):
        y, colour = 62 + 47 * expert, COLOURS[expert]
        chosen = expert in weight
        drawn.text(150, y, f"{share:.2f}", 12, "ink" if chosen else "soft")
        long = 110 * share / max(shares)
        drawn.box(172 + long / 2, y, "", long, 16, colour if chosen else "line")
        drawn.box(435, y, f"expert {expert}", 90, 32, colour if chosen else "line", dashed=not chosen)
        if chosen:
            drawn.line(172 + long + 6, y, 386, y, colour)
            drawn.line(482, y, 538, 132 + (y - 132) * 0.12, colour)
            drawn.text(510, y + (132 - y) * 0.42 - 14 * (1 if y < 132 else -1.6), f"{weight[expert]:.2f}", 12, colour)
    drawn.box(640, 132, "y = " + " + ".join(f"{weight[e]:.2f} E{e}(x)" for e in sorted(best)), 196, 34)
    drawn.parts.append(
        '<path d="M55 149V246H640V152" fill="none" stroke="var(--soft)" stroke-width="1.4" stroke-dasharray="2 4"/>'
    )
    drawn.text(348, 236, "the residual carries x past the layer, whatever is dropped", 12, "soft")
    return drawn


def capacity() -> Drawing:
    stays = kept(CHOSEN)
    drawn = Drawing("capacity", "Experts keep the first two tokens that ask for them; the third is dropped", 760, 250)
    drawn.text(
        380,
        18,
        "eight tokens in global order, top-1, four experts, factor 1.0: C = ceil(1.0 x 1 x 8 / 4) = 2",
        13,
        "soft",
    )
    for token, expert in enumerate(CHOSEN):
        drawn.box(205 + 50 * token, 52, str(token), 36, 26, COLOURS[expert])
    for expert in range(4):
        x = 110 + 180 * expert
        asked = [token for token, chosen in enumerate(CHOSEN) if chosen == expert]
        drawn.panel(x - 74, 98, 148, 140, f"expert {expert}, asked by {len(asked)}")
        for place in range(2):
            drawn.box(x - 24 + 48 * place, 148, "", 40, 28)
        inside = [token for token in asked if stays[token]]
        for place, token in enumerate(inside):
            drawn.box(x - 24 + 48 * place, 148, str(token), 40, 28, COLOURS[expert])
        for place, token in enumerate(one for one in asked if not stays[one]):
            drawn.box(x + 48 * place, 188, str(token), 40, 28, COLOURS[expert], dashed=True)
            drawn.cross(x + 48 * place + 28, 188)
            drawn.text(x, 222, "dropped: adds zero", 12, "bad")
        if len(inside) < 2:
            drawn.text(x, 188, "a place stays empty", 12, "soft")
    return drawn


def pools() -> Drawing:
    drawn = Drawing(
        "pools", "Two experts with a limit each drop one row; sharing their places they drop none", 760, 190
    )
    asked = ((0, (0, 2, 4)), (1, (3,)))
    for x, words, pool in (
        (20, "capacity_pool: 1 - a limit of C = 2 each", 1),
        (390, "capacity_pool: 2 - one limit of 2 C = 4", 2),
    ):
        drawn.panel(x, 10, 350, 170, words)
        free, middle = 4, x + 175
        for expert, tokens in asked:
            y = 66 + 58 * expert
            drawn.text(x + 14, y, f"expert {expert}", 13, COLOURS[expert], "start")
            limit = 2 if pool == 1 else free
            for place, token in enumerate(tokens):
                drawn.box(middle - 60 + 50 * place, y, str(token), 40, 28, COLOURS[expert], dashed=place >= limit)
                if place >= limit:
                    drawn.cross(middle - 60 + 50 * place + 28, y)
            free -= min(limit, len(tokens))
            if pool == 1 and len(tokens) < limit:
                drawn.box(middle - 60 + 50 * len(tokens), y, "", 40, 28)
        words = "one dropped, one place empty" if pool == 1 else "all four places used, nothing dropped"
        drawn.text(middle, 164, words, 12, "bad" if pool == 1 else "soft")
    return drawn


def layouts() -> Drawing:
    layout, experts = Layout(world=8, tp=2, ep=4), 8
    drawn = Drawing("layouts", "Eight ranks as dp 4 x tp 2, with experts over ep groups of four", 760, 300)
    drawn.text(380, 16, "world 8 = dp 4 x tp 2; ep 4, edp 2; eight experts", 13, "soft")
    middle = [60 + 91 * rank for rank in range(8)]
    for group in layout.groups("tp"):
        drawn.bracket(middle[group[0]] - 36, middle[group[-1]] + 36, 56, f"tp: ranks {group[0]}, {group[-1]}")
    for rank in range(8):
        x, place = middle[rank], layout.ranks("ep", rank).index(rank)
        each = experts // layout.ep
        drawn.panel(x - 41, 70, 82, 132)
        drawn.text(x, 86, f"rank {rank}", 13)
        drawn.box(x, 114, f"batch {rank // layout.tp}", 70, 22)
        drawn.box(x, 144, f"heads {4 * (rank % layout.tp)}-{4 * (rank % layout.tp) + 3}", 70, 22)
        drawn.box(x, 178, f"E{place * each}-{place * each + each - 1}", 70, 26, COLOURS[place])
    for group in layout.groups("ep"):
        drawn.bracket(
            middle[group[0]] - 36,
            middle[group[-1]] + 36,
            214,
            f"ep: ranks {group[0]} to {group[-1]}, all eight experts",
            up=False,
        )
    same = layout.ranks("edp", 0)
    dashes = 'stroke="var(--a)" stroke-width="1.6" stroke-dasharray="4 3"'
    there, back = middle[same[0]], middle[same[1]]
    drawn.parts.append(f'<path d="M{there} 246V264H{back}V246" fill="none" {dashes}/>')
    drawn.text(
        (middle[same[0]] + middle[same[1]]) / 2,
        280,
        f"edp: ranks {same[0]}, {same[1]} hold the same experts; their gradients are summed",
        12,
        "a",
    )
    return drawn


def one_meaning() -> Drawing:
    drawn = Drawing("one-meaning", "However eight tokens are cut over ranks, the same two are dropped", 760, 310)
    drawn.text(400, 16, "eight tokens, coloured by the expert they ask for; C = 2 over all ranks", 13, "soft")
    everywhere = kept(CHOSEN)
    rows = [(f"{ranks} rank{'s' * (ranks > 1)}", ranks, everywhere) for ranks in (1, 2, 4)]
    alone = [stays for start in (0, 4) for stays in kept(CHOSEN[start : start + 4])]
    rows.append(("2 ranks, each", 2, alone))
    for row, (words, ranks, stays) in enumerate(rows):
        y, each = 56 + 60 * row + 34 * (row == 3), 8 // ranks
        drawn.text(14, y, words, 13, "ink", "start")
        if row == 3:
            drawn.text(14, y + 16, "capping its own", 13, "ink", "start")
        for rank in range(ranks):
            drawn.panel(140 + 62 * each * rank, y - 22, 62 * each - 10, 44)
        for token, expert in enumerate(CHOSEN):
            x = 166 + 62 * token
            drawn.box(x, y, str(token), 38, 26, COLOURS[expert], dashed=not stays[token])
            if not stays[token]:
                drawn.cross(x + 16, y - 12)
        lost = [str(token) for token in range(8) if not stays[token]]
        drawn.text(646, y, f"drops {' and '.join(lost)}", 13, "ink" if row < 3 else "bad", "start")
    drawn.line(14, 222, 746, 222, "line", arrow=False)
    drawn.text(14, 236, "capacity_scope: local", 12, "soft", "start")
    return drawn


def ranges() -> Drawing:
    drawn = Drawing(
        "ranges", "A parameter is saved as two ranges by two ranks, and read as four by four ranks", 760, 250
    )
    left, unit = 150, 48
    for y, words in ((50, "two ranks save"), (126, "the checkpoint"), (202, "four ranks load")):
        drawn.text(14, y, words, 13, "ink", "start")
    for rank in range(2):
        x = left + unit * 6 * rank
        drawn.box(
            x + unit * 3, 50, f"rank {rank}: elements {6 * rank} to {6 * rank + 5}", unit * 6 - 8, 32, COLOURS[rank]
        )
        drawn.line(x + unit * 3, 70, x + unit * 3, 104)
        drawn.box(x + unit * 3, 126, f"rank-0000{rank}.safetensors, SHA-256", unit * 6 - 8, 34)
    for rank in range(4):
        x = left + unit * 3 * rank
        drawn.line(x + unit * 1.5, 147, x + unit * 1.5, 180)
        drawn.box(x + unit * 1.5, 202, f"{3 * rank} to {3 * rank + 2}", unit * 3 - 8, 32, COLOURS[rank])
    drawn.text(left + unit * 6, 16, "one logical parameter of twelve elements", 13, "soft")
    drawn.text(left + unit * 6, 236, "manifest.json names every range; it is written last", 12, "soft")
    return drawn


def restarts() -> Drawing:
    drawn = Drawing(
        "restarts", "A run killed at step 27 goes on from step 20, killed while saving step 40 from step 30", 760, 216
    )

    def x(step: float) -> float:
        return 100 + 9 * step

    parts = ((0, 27, "killed at step 27"), (20, 40, "killed while it saves step 40"), (30, 50, ""))
    for row, (start, end, what) in enumerate(parts):
        y = 40 + 52 * row
        drawn.text(14, y, f"start {row + 1}", 13, "ink", "start")
        drawn.line(x(start), y, x(end) - 2, y, "b" if not what else "a", wide=4, arrow=False)
        for step in range(10 * (start // 10 + 1), end + 1, 10):
            whole = step < end or not what
            drawn.box(x(step), y, str(step), 30, 20, "b" if whole else "bad", dashed=not whole)
        if what:
            drawn.cross(x(end), y, 7) if end % 10 else None
            drawn.text(x(end) + 24, y, what, 12, "bad", "start")
    for step, row in ((20, 0), (30, 1)):
        drawn.line(x(step), 52 + 52 * row, x(step), 80 + 52 * row, "b")
    drawn.text(x(50) + 24, 144, "done", 12, "b", "start")
    words = "green: whole checkpoints. Step 40 has no manifest yet, so it is none; the next start takes 30."
    drawn.text(14, 190, words, 12, "soft", "start")
    return drawn


DRAWINGS: tuple[Callable[[], Drawing], ...] = (routing, capacity, pools, layouts, one_meaning, ranges, restarts)


if __name__ == "__main__":
    for draw in DRAWINGS:
        drawn = draw()
        (HERE / f"{drawn.name}.svg").write_text(drawn.svg(), encoding="utf-8")
