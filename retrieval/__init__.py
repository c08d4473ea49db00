"""From documents and queries to hits: encode, store, index, search, measure."""
