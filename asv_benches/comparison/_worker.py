"""The process behind one cell: results of all instances as one line of JSON, then seconds per call for each duration.

`_measure.Worker` starts it as ``python -m comparison._worker PROBLEM LIBRARY TASKS``, with a file of pickled `Tasks`.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from benchmarks._common import burst, kilobytes, pin_threads

from ._frameworks import FRAMEWORKS, Framework
from ._measure import LIMIT, PATIENCE, Task, Tasks
from ._problem import LIBRARIES, Inputs, Outcome, Problem, load_problems, relative_error, verdict

SECOND = 1e-4  # a second derivative with a larger relative error is wrong
UNRELATED = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)  # they say nothing about a result

Call = Callable[..., tuple[Any, Any]]


def main() -> None:
    name, library, path = sys.argv[1:]
    problem, tasks = load_problems()[name], pickle.loads(Path(path).read_bytes())
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever a library prints must not look like an answer

        def answer(value: Any) -> None:
            answers.write(f"{json.dumps(value)}\n")
            answers.flush()

        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # both end the process
        signal.alarm(PATIENCE)
        try:
            on = FRAMEWORKS[LIBRARIES[library].framework]()
            loss = problem.cells[library]()
        except Exception as error:  # noqa: BLE001  # whatever a library raises is the result
            answer({"missing": message(error)})
            return
        pin_threads()
        call = on.gradient(loss) if problem.is_gradient else on.value(loss)
        answer(report(problem, on, loss, call, tasks))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        once = prepared(on, call, tasks.large)
        for line in sys.stdin:
            answer(burst(once, float(line)))


def prepared(on: Framework, call: Call, inputs: Inputs) -> Callable[[], Any]:
    """Return a call with arrays of the framework, made beforehand, that waits for its result."""
    arguments = converted(on, inputs)
    x = arguments.pop("x")
    return lambda: on.wait(call(x, **arguments))


def converted(on: Framework, inputs: Inputs) -> Inputs:
    """Return the arguments of a loss as arrays of the framework."""
    given = {name: value for name, value in inputs.items() if not name.startswith("_")}
    return {name: on.array(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}


def message(error: Exception) -> str:
    """Return the class and the first line of an error that says something: frameworks wrap errors of a traced call."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    if lines and lines[0].endswith((":", "(most recent call last)")):
        lines = raised or [line for line in lines[1:] if not line.endswith(":")]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def attempt(problem: Problem, on: Framework, call: Call, inputs: Inputs) -> Outcome:
    """Call a library once and keep what it returned and what it said."""
    with warnings.catch_warnings(record=True) as caught, np.errstate(all="warn"):
        warnings.simplefilter("always")
        try:
            value, ok = prepared(on, call, inputs)()
            result = problem.compared(np.asarray(value))
            status = "" if bool(ok) else "its status"
        except Exception as error:  # noqa: BLE001
            return Outcome(None, message(error))
    told = [str(one.message).splitlines()[0][:200] for one in caught if not issubclass(one.category, UNRELATED)]
    return Outcome(result, "; ".join(dict.fromkeys(filter(None, [status, *told]))))


def report(problem: Problem, on: Framework, loss: Any, call: Call, tasks: Tasks) -> dict[str, Any]:
    """Measure everything that needs no other process."""
    try:
        grown, fails = memory(on, call, tasks.large), ""
    except Exception as error:  # noqa: BLE001
        grown, fails = None, message(error)
    return {
        "errors": {dtype: errors(problem, on, call, some, dtype) for dtype, some in tasks.instances.items()},
        "second": second(problem, on, loss, tasks),
        "hard": on_hard(attempt(problem, on, call, tasks.hard)) if tasks.hard else None,
        "memory": grown,
        "fails": fails,  # on the instance whose time is taken
    }


def errors(problem: Problem, on: Framework, call: Call, tasks: list[Task], dtype: str) -> dict[str, Any]:
    """Judge every instance, and summarise the relative errors of the finite results."""
    on.use(dtype)
    found, verdicts, said = [], Counter({"right": 0, "silent": 0, "nan": 0, "told": 0}), ""
    for task in tasks:
        outcome = attempt(problem, on, call, task.inputs)
        judged = verdict(outcome, task.truth, dtype)
        verdicts[judged] += 1
        if judged == "told":
            said = said or outcome.said
        if outcome.value is not None and np.all(np.isfinite(outcome.value)):
            found.append(relative_error(outcome.value, task.truth))
    on.use("float64")
    summary = {"median": digits(median(found)), "worst": digits(max(found))} if found else {}
    return {**verdicts, **summary, "said": said}


def digits(value: float) -> float:
    """Round to two digits: the last digits of an error differ between machines."""
    return float(f"{value:.1e}")


def second(problem: Problem, on: Framework, loss: Any, tasks: Tasks) -> str | None:
    """Try to differentiate the gradient of the first instance along a direction, and compare."""
    if tasks.second is None:
        return None
    task, direction = tasks.second
    twice = on.second(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            along = prepared(on, lambda x, **constants: twice(x, on.array(direction), **constants), task.inputs)
            found = problem.compared(np.asarray(along()))
        except Exception as error:  # noqa: BLE001
            return f"no: {message(error)}"
    if not np.all(np.isfinite(found)):
        return "NaN"
    error = relative_error(found, task.truth)
    return "yes" if error <= SECOND else f"wrong: relative error {error:.1e}"


def on_hard(outcome: Outcome) -> str:
    """Name the way in which a library says that there is no result."""
    if outcome.value is None:
        return f"error: {outcome.said}"
    if not np.all(np.isfinite(outcome.value)):
        return f"NaN and a warning: {outcome.said}" if outcome.said else "NaN"
    if outcome.said == "its status":
        return "status"
    return f"warning: {outcome.said}" if outcome.said else "nothing"


def memory(on: Framework, call: Call, inputs: Inputs) -> float | None:
    """Return by how many MiB the process grows during one call that is not the first one."""
    once, clear = prepared(on, call, inputs), Path("/proc/self/clear_refs")
    once()
    if not clear.exists():
        return None
    before = kilobytes("VmRSS")
    clear.write_text("5", encoding="utf-8")  # the peak starts from here
    once()
    return round(max(0, kilobytes("VmHWM") - before) / 1024, 1)


if __name__ == "__main__":
    main()
