"""Owns how the results look: one row a client, one column an ability."""

from .catalogue import ABILITIES, Client
from .environments import Installed
from .runs import Result


def render(
    clients: list[Client], installed: dict[str, Installed], results: list[Result], silence_s: float
) -> str:
    """The table in Markdown, with what each column proves below it."""
    found = {(result.client, result.ability): result for result in results}
    header = ["client", "version", *(ability.replace("_", " ") for ability in ABILITIES)]
    rows = [header, ["---"] * len(header)]
    for client in clients:
        state = installed[client.name]
        cells = [_cell(client, ability, state, found) for ability in ABILITIES]
        rows.append([client.name, state.versions or state.missing, *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    meaning = [f"- **{ability.replace('_', ' ')}**: {what}" for ability, what in ABILITIES.items()]
    note = (
        f"Each silence lasts {silence_s:g} s; the text is compared with what the engine said. `–`: not tried."
    )
    return "\n".join([*lines, "", note, "", *meaning, ""])


def _cell(client: Client, ability: str, state: Installed, found: dict) -> str:
    result = found.get((client.name, ability))
    if result is None:
        return "not here" if state.missing and ability in client.abilities else "–"
    return (
        f"ok, {result.seconds:.0f} s"
        if result.ok and ability.startswith("silence")
        else ("ok" if result.ok else "FAILS")
    )
