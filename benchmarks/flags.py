"""Tell a benchmark's own flags from the settings of a run that it passes on."""


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return a benchmark's own flags and a run's dotted settings (`--model.depth 4`), each with its values."""
    own: list[str] = []
    dotted: list[str] = []
    target = own
    for word in argv:
        if word.startswith("--"):
            target = dotted if "." in word.partition("=")[0] else own
        target.append(word)
    return own, dotted
