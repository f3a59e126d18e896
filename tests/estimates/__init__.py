"""Whether ``info.error`` is the error: the estimate against the truth, on problems drawn from a seed and not filtered.

``python -m tests.estimates --problems 1000 --record docs/estimates.md`` writes the table of the documentation;
``tests/infrastructure/test_estimates.py`` asserts its promises on fewer problems. True errors come from extended
precision. Problems are of the same kinds as the hard ones of ``ddnref verify``, the ordinary ones of the rule table,
and families that spread conditions and distances over many decades.
"""
