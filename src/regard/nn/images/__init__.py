"""What layers of images share: grids, planes, windows, gates and kernels on maps, hosts and small nets."""
