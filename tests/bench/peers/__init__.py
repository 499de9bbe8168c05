"""Owns `make bench-peers`: glmserve beside other servers, on the same weights, under the same load, in turns.

Invariant: a contender that cannot run is in the report with the reason; no figure stands in for one.
"""
