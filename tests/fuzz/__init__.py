"""A fuzz campaign over every public function: hostile arrays and options, and an oracle that can fail.

``python -m tests.fuzz --cases 20000 --seed 0`` runs it in worker processes;
``tests/infrastructure/test_fuzz.py`` runs its first 2,000 cases. A case is a function, an input that it takes, and one
mutation of that input, all from ``(seed, case)``.
"""
