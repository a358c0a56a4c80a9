"""The models of this worker: found in the folder, tried in a child, loaded, announced."""
