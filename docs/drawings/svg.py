"""A little SVG. Colours are variables: a page sets them by its palette; elsewhere the system's light or dark does."""

from html import escape

_LIGHT = {
    "ink": "#1f2328",
    "soft": "#5d6570",
    "line": "#c9ccd1",
    "panel": "#f4f5f7",
    "paper": "#ffffff",
    "a": "#2f6fb0",
    "b": "#1f7a36",
    "c": "#a8620b",
    "d": "#8a3d9c",
    "bad": "#b3261e",
}
_DARK = {
    "ink": "#e3e6ea",
    "soft": "#a9b1bc",
    "line": "#4b525c",
    "panel": "#262a33",
    "paper": "#1e2129",
    "a": "#6aa9e9",
    "b": "#5fbf78",
    "c": "#e0a04a",
    "d": "#c68fd6",
    "bad": "#f0867e",
}
COLOURS = "abcd"  # of experts, or of ranks


class Drawing:
    """Grows by parts; x and y are the middle of what is drawn, but for lines and panels."""

    def __init__(self, name: str, about: str, width: int, height: int) -> None:
        self.name, self.about, self.width, self.height = name, about, width, height
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, size: int = 13, colour: str = "ink", at: str = "middle") -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y + size * 0.35:g}" font-size="{size}" text-anchor="{at}" '
            f'fill="var(--{colour})">{escape(words)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        words: str = "",
        width: float = 40,
        height: float = 24,
        colour: str = "",
        dashed: bool = False,
    ) -> None:
        """Filled with a colour; or, dashed, only its frame in that colour; without one, a panel."""
        fill = f"var(--{colour})" if colour and not dashed else "var(--paper)" if dashed else "var(--panel)"
        frame = f"var(--{colour or 'line'})"
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="4" '
            f'fill="{fill}" stroke="{frame}" stroke-width="1.5"{dashes}/>'
        )
        if words:
            self.text(x, y, words, 12, "soft" if dashed else "paper" if colour else "ink")

    def panel(self, x: float, y: float, width: float, height: float, words: str = "") -> None:
        """From its upper left corner, with words in it there."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="var(--panel)" '
            'stroke="var(--line)"/>'
        )
        if words:
            self.text(x + 10, y + 14, words, 12, "soft", "start")

    def line(
        self, x: float, y: float, to_x: float, to_y: float, colour: str = "soft", arrow: bool = True, wide: float = 1.6
    ) -> None:
        end = f' marker-end="url(#{self.name}-{colour})"' if arrow else ""
        self.parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="var(--{colour})" '
            f'stroke-width="{wide:g}"{end}/>'
        )

    def bracket(self, x: float, to_x: float, y: float, words: str, colour: str = "soft", up: bool = True) -> None:
        """Over what lies below it, or under what lies above it."""
        tip = 6 if up else -6
        self.parts.append(
            f'<path d="M{x:g} {y + tip:g}V{y:g}H{to_x:g}V{y + tip:g}" fill="none" stroke="var(--{colour})" '
            'stroke-width="1.6"/>'
        )
        self.text((x + to_x) / 2, y - tip * 1.7, words, 12, colour)

    def cross(self, x: float, y: float, size: float = 5) -> None:
        left, right, top, foot = x - size, x + size, y - size, y + size
        self.parts.append(
            f'<path d="M{left:g} {top:g}L{right:g} {foot:g}M{right:g} {top:g}L{left:g} {foot:g}" '
            'stroke="var(--bad)" stroke-width="2.6" fill="none"/>'
        )

    def svg(self) -> str:
        """One block without an empty line, so that Markdown takes it as it is."""
        arrows = "".join(
            f'<marker id="{self.name}-{colour}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="var(--{colour})"/></marker>'
            for colour in _LIGHT
            if f"url(#{self.name}-{colour})" in "".join(self.parts)
        )
        style = (
            f"svg.drawing{{{_variables(_LIGHT)}font-family:system-ui,'Segoe UI',Roboto,Arial,sans-serif}}"
            f"@media (prefers-color-scheme:dark){{svg.drawing{{{_variables(_DARK)}}}}}"
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" aria-label="{escape(self.about)}">'
        )
        return "\n".join([head, f"<style>{style}</style>", f"<defs>{arrows}</defs>", *self.parts, "</svg>"]) + "\n"


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())
