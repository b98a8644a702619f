"""The one way this project says that an input is wrong.

Knows the four parts every such message has; knows nothing of files, arrays or networks.
"""


class InputError(ValueError):
    """An input that the user can mend: where it is, what was found, the rule it breaks, the remedy.

    Raised at the border, before anything is written.
    """

    def __init__(self, where: object, *, found: object, rule: str, remedy: str) -> None:
        super().__init__(f"{where}: found {found}; {rule}. Remedy: {remedy}.")
        self.where, self.found, self.rule, self.remedy = str(where), str(found), rule, remedy

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the parts when the error crosses a process border (Ray, DataLoader)."""
        return _rebuild, (type(self), self.where, self.found, self.rule, self.remedy)


class StorageError(InputError):
    """A disk or bucket that refuses whatever is asked of it: full, read-only, out of reach. To ask again may help."""


def _rebuild(kind: type[InputError], where: str, found: str, rule: str, remedy: str) -> InputError:
    return kind(where, found=found, rule=rule, remedy=remedy)
