"""Owns the check that the Rust files form no circle and keep to the layers that docs/architecture.md draws.

Invariant: what is allowed stands in the document alone, in its blocks marked `layers`; this package has the
rules of reading them.

What counts as "file A uses file B":

* a `use` of A, or a path in its code that begins with `crate`, `self`, `super`, a module or a crate of the
  workspace, that ends in B. A path is followed through `use` and `pub use` to the file that defines the item,
  so a re-export is a use of the file behind it and not of the file that re-exports;
* a `pub use` (also `pub(crate)`) is no use by itself: only if the code of the same file has the name too.

What does not count: `mod b;`, comments and strings, everything under `#[cfg(test)]`, `pub(in path)`,
`$crate` in macros, the programs in tests/, examples/ and benches/, and items that a macro makes.

The blocks of the document, one statement a line, # for comments:

    crate PATH: PATH ...         the crate in folder PATH uses these crates of the workspace, and no others
    within PATH: A B > C > D     the modules of a crate from top to bottom; a file uses its own layer and
                                 those below. A name stands for the file and all below it; the longest counts
    only NAME: PATH ...          the external crate NAME is used in these modules and those below them, only

    PYTHONPATH=tests/tools python3 -m layers           # prints what is wrong, and fails if anything is
    PYTHONPATH=tests/tools python3 -m layers --graph   # prints which file uses which
"""
