"""The report: what the stages left on disk, turned into tables, sentences and pictures on one page."""
