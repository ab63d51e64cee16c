"""From folders of images to data that training reads: convert, encode, pack, verify."""
