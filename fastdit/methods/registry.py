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
    for name in names:
        if name not in METHODS:
            choices = f"{', '.join(METHODS)}, or several joined by +"
            raise UserError(f"method: {name or 'nothing'} is not a method; choose of {choices}")
        if names.count(name) > 1:
            raise UserError(f"method: {text} names {name} twice; name it once")
    known = [METHODS[name] for name in names]
    for one, other in combinations(known, 2):
        if reason := _refusal(one, other):
            raise UserError(f"method: {one.name} and {other.name} cannot be joined, for {reason}; leave one out")

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
