"""Reads a page as a browser would: what it would run or load, and the text that it would show."""

from __future__ import annotations

from html.parser import HTMLParser


class Markup(HTMLParser):
    """Collects what a browser would run or load, and the text that it would show."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.active: list[str] = []
        self.text = ""
        self.links: set[str] = set()
        self.rows: list[list[str]] = []
        """Rows of tables, as the texts of their cells."""
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._in_cell = True
        own = "/static/" in (given.get("src") or given.get("href") or "")
        if tag in ("script", "link", "img") and not own:
            self.active.append(f"<{tag}> {given}")
        if tag in ("iframe", "object", "embed", "base", "style", "b"):
            self.active.append(f"<{tag}>")
        for name, value in attrs:
            if name.startswith("on") or name == "style":
                self.active.append(f"{name}={value}")
            if name in ("href", "action", "src", "formaction", "xlink:href"):
                self.links.add(value or "")
                if not (value or "").startswith(("/", "#", "?")) or (value or "").startswith("//"):
                    self.active.append(f"{name}={value}")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """Return the cells of the row with this text in its first cell, without characters that only break lines."""
        rows = [[" ".join(cell.replace("\u200b", "").split()) for cell in row] for row in self.rows]
        (found,) = (row for row in rows if row and row[0] == first)
        return found


def parsed(text: str) -> Markup:
    found = Markup()
    found.feed(text)
    found.close()
    return found
