"""Every public name of the package and what it stands for, by subject module."""

from importlib import import_module

SUBJECTS = ("errors", "linalg", "operators", "krylov", "implicit", "nodes", "networks", "curvature")
MODULES = {subject: import_module(f"ddnref.{subject}") for subject in SUBJECTS}
QUALIFIED = {name: f"{subject}.{name}" for subject, module in MODULES.items() for name in module.__all__}
PUBLIC = {name: getattr(MODULES[subject], name) for subject in SUBJECTS for name in MODULES[subject].__all__}
