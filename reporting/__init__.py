"""Reports as HTML: a file each, which needs nothing from outside."""
