"""Choose the licence that a model card names, from those of the texts that the model learnt from."""

from collections.abc import Collection
from typing import NamedTuple

SHARE_ALIKE = "CC BY-SA "
NEWEST_SHARE_ALIKE = "cc-by-sa-4.0"  # texts under earlier versions may be adapted under later ones
SEVERAL = "licences-of-data-and-base"


class Licence(NamedTuple):
    """The fields license and license_name of a model card."""

    license: str
    license_name: str | None


def choose_licence(names: Collection[str], *, has_foreign_base: bool) -> Licence:
    """Return the licence of a model. Share-alike texts and a base trained on them alone give share-alike.

    Whether a model adapts the texts that it learnt from is not settled; the card takes the careful view.
    Anything else is "other", and the card's section on licences says more.
    """
    if names and not has_foreign_base and all(name.startswith(SHARE_ALIKE) for name in names):
        return Licence(NEWEST_SHARE_ALIKE, None)
    return Licence("other", SEVERAL)
