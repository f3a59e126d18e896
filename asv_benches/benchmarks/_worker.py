"""The process behind ``_common.Worker``: a duration in, seconds a call out, or what is missing; one line each."""

from __future__ import annotations

import json
import os
import sys

from ._common import Case, burst, pin_threads


def main() -> None:
    name, options, warm_up = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever a library prints must not look like an answer

        def answer(value: float | str) -> None:
            answers.write(f"{json.dumps(value)}\n")
            answers.flush()

        try:
            call = Case(name, options).build()
        except NotImplementedError as missing:
            answer(str(missing))
            return
        pin_threads()
        answer(burst(call, warm_up))
        for line in sys.stdin:
            answer(burst(call, float(line)))


if __name__ == "__main__":
    main()
