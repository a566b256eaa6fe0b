"""A vocabulary cut to the languages somebody speaks: rows of tables that stay, rows that go.

- ``languages``: what a language, program text or a file of one's own is made of;
- ``choice``: which tokens stay; ``merges``: and what stays with them;
- ``rows``: the tables' rows on the way from a checkpoint; ``cut``: in a bundle that exists;
- ``receipt``: what it changed, measured on text that was not used for choosing.
"""
