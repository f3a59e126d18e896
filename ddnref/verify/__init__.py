"""The command line: ``ddnref verify`` checks every rule, ``ddnref report`` shows what they do on real data."""
