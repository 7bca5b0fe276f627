"""What a run will take, before it begins: where its work lies, memory, disk, time."""
