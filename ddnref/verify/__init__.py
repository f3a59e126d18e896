"""The command ``ddnref``: ``ddnref verify`` checks every rule, ``ddnref report`` shows the rules on real data."""
