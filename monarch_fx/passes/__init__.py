"""Graphs: capture, candidates, selection, checks, rewriting."""
