"""Archives as such: the records of zip and tar files, read strictly, and zip files written."""
