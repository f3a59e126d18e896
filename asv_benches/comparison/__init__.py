"""The comparison with other libraries: problems, the code of each library, oracles and tables. `compare.py` runs it.

Each module without an underscore holds a group of problems, and for each library the lines that a user would write.
"""
