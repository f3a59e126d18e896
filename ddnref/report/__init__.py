"""The command line: ``ddnref verify`` checks every rule, ``ddnref report`` shows what they do on real data.

Nothing here is imported by the package itself. ``pip install "ddnref[report]"`` brings what it needs.
"""
