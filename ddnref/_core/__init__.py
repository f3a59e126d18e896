"""Namespaces, checks and loops, which every other package builds on."""
