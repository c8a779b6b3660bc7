"""Arguments of the model's call that are for adapters alone, such as the task of each row.

Where the adapters change the call of modules inside the model, an encoder and a decoder, the arguments are taken out of
the model's own call, and found when those modules are called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class OwnArguments:
    """Their names, and those of the model's call that is in progress in this thread.

    Args:
        names: of all active adapters.
        lasts: whether the module is called more than once, as a bound one is, perhaps from several threads.
    """

    def __init__(self, names: Sequence[str], lasts: bool) -> None:
        self.names = tuple(names)
        self.lasts = lasts
        self._here = threading.local() if lasts else None
        self._given: Mapping[str, Any] = {}

    def held(self) -> Mapping[str, Any]:
        """Those of the model's call in progress; none outside of one."""
        return self._given if self._here is None else getattr(self._here, "given", {})

    def taking(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the model returns, which is not given them."""
        self._hold({name: kwargs.pop(name) for name in self.names if name in kwargs})
        try:
            return run(*args, **kwargs)
        finally:
            self._hold({})

    def _hold(self, given: Mapping[str, Any]) -> None:
        if self._here is None:
            self._given = given
        else:
            self._here.given = given

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "lasts": self.lasts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["names"], state["lasts"])
