"""List all methods. A new method takes one file in this folder and one line here."""

from itertools import combinations
from pkgutil import resolve_name

from fastdit.errors import UserError
from fastdit.methods.denoising import Denoising
from fastdit.methods.wrapper import Wrapper

# Each line names a module and the class of its method. Wrappers are built in this order, from the inside out.
_CLASSES = (
    "fastdit.methods.denoising:Denoising",
    "fastdit.methods.self_discrimination:SelfDiscrimination",
    "fastdit.methods.structure_game:StructureGame",
    "fastdit.methods.psi_alignment:PsiAlignment",
)

METHODS: dict[str, type[Denoising]] = {method.name: method for method in map(resolve_name, _CLASSES)}


def methods_of(text: str) -> list[type[Denoising]]:
    """Return the methods that `--method` joins by +, in the order in which they are built.

    The first is the method that builds the network; it is dit if none is named. Wrappers follow, the innermost first.
    Raises UserError for an unknown method and for a combination that is refused.
    """
    # Look up the names, and refuse those that are unknown, repeated or do not fit together.
    names = text.split("+")
    known = [METHODS[name] for name in dict.fromkeys(names) if name in METHODS]
    if len(known) < len(names) or any(_refusal(*pair) for pair in combinations(known, 2)):
        choices = f"one of {', '.join(METHODS)}, or several joined by +"
        raise UserError(f"method: must be {choices}, got {text or 'nothing'}; refused are {_refusals()}")

    # Put the base before its wrappers.
    bases = [method for method in known if not issubclass(method, Wrapper)]
    wrappers = [method for method in METHODS.values() if method in known and issubclass(method, Wrapper)]
    return [*(bases or [Denoising]), *wrappers]


def canonical_name(text: str) -> str:
    """Return `text` with its methods in the order of configuration files: the base, then the outermost wrapper first.

    Raises UserError as `methods_of` does.
    """
    base, *wrappers = methods_of(text)
    names = [wrapper.name for wrapper in reversed(wrappers)]
    return "+".join(names if wrappers and base is Denoising else [base.name, *names])


def _refusal(one: type[Denoising], other: type[Denoising]) -> str | None:
    """Return the reason why two methods cannot be combined; None if they can."""
    if Denoising in (one, other):
        return "each other method contains dit"
    if not issubclass(one, Wrapper) and not issubclass(other, Wrapper):
        return "each builds a network of its own"
    return one.refuses.get(other.name) or other.refuses.get(one.name)


def _refusals() -> str:
    """Return a list of all refused pairs and the reasons, for messages."""
    first, *others = METHODS.values()
    pairs = [(one, other, _refusal(one, other)) for one, other in combinations(others, 2)]
    listed = [f"{one.name}+{other.name} ({reason})" for one, other, reason in pairs if reason]
    return ", ".join([f"{first.name}+any ({_refusal(first, others[0])})", *listed])
