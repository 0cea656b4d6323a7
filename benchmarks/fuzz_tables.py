"""Two of the tables of `tables.py`: what became of damaged checkpoints, and of writers that were killed."""

from __future__ import annotations

from markdown_tables import load, machine_line, table


def mutations() -> str:
    """Verdicts on damaged and hostile checkpoints, by family."""
    content = load("fuzz")
    if content is None:
        return ""
    found = content["mutations"]
    good = ("same", "refused", "unknowable", "cryptic, theirs")
    lines = []
    for name, verdicts in (*found["families"].items(), ("all", found["verdicts"])):
        counts = [verdicts.get(word, 0) for word in good]
        total = sum(verdicts.values())
        lines.append([name, *(f"{count:,}" for count in (total, *counts, total - sum(counts)))])
    titles = ["checkpoint", "changed", "no effect", "refused by name", "not detectable", "Transformers' error", "faults"]
    return table(titles, lines) + machine_line(content)


def kills() -> str:
    """What killed writers left, by what was written."""
    content = load("fuzz")
    if content is None:
        return ""
    found = content["kills"]
    lines = [[name, str(count)] for name, count in found["jobs"].items()]
    lines.append(["all", str(found["kills"])])
    lines += [[f"... {_STATES[state]}", str(count)] for state, count in sorted(found["found"].items())]
    lines += [["... with left-overs, all named and removed by the next run", str(found["left_something"])]]
    lines += [["faults", str(found["faults"])]]
    return table(["killed while writing with", "kills"], lines) + machine_line(content)


# What lies in the output folder after a kill.
_STATES = {
    "absent": "nothing is there yet",
    "new": "the new model is complete",
    "old": "the old model is unchanged",
    "refused": "files of save_pretrained or convert() that do not load",
}
