"""The table of rules: each operation once, for bridges, verification, benchmarks and documentation."""
