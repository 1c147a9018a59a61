"""Images on disk: LMDB stores in two layouts, folders, archives; writing and copying stores."""
