"""The composition methods, one file each. A new one is a new file with `@method(...)` on its search."""
