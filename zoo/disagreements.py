"""Where the upstream library and the vendor disagree about a model, which of them zoo follows, and why.

The entries lie beside the families that they touch (`Family.disagreements`). `zoo show` and the certificate list them.
Where the library is on the other side, the verifier corrects its model in exactly that point, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from zoo.spec import Spec


def _any(_: Spec) -> bool:
    return True


@dataclass(frozen=True)
class Disagreement:
    """One point on which two implementations of a family differ.

    `upstream`, `vendor`: what transformers does, what the vendor's own code does. `follows`: whom zoo follows; "design"
    where the vendor's code departs from the vendor's paper; "open" where nobody has said which is right (zoo then does
    as upstream does). `why`: what decided it. `source`: a public place that says so. `since`: month, YYYY-MM.
    `applies`: whether a model of the family is touched. `correct`: changes upstream's loaded model to do as zoo does;
    None where upstream does so already.
    """

    about: str
    upstream: str
    vendor: str
    follows: Literal["vendor", "upstream", "design", "open"]
    why: str
    source: str
    since: str
    applies: Callable[[Spec], bool] = _any
    correct: Callable[[Any], None] | None = None

    def __str__(self) -> str:
        whom = {
            "vendor": "the vendor",
            "upstream": "upstream",
            "design": "the design",
            "open": "upstream, undecided",
        }
        return (
            f"{self.about}: upstream {self.upstream}; the vendor {self.vendor}. zoo follows {whom[self.follows]}: "
            f"{self.why} ({self.source})"
        )

    def to_json(self) -> dict[str, Any]:
        names = ("about", "upstream", "vendor", "follows", "why", "source", "since")
        return {name: getattr(self, name) for name in names}
