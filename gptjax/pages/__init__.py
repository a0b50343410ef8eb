"""Self-contained HTML pages: no other file, no network, light and dark, on a phone and on paper."""
