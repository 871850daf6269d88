"""Markdown tables."""


def markdown(header: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table; empty without rows."""
    if not rows:
        return ""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
