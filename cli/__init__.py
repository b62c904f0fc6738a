"""The `medseg` command line, installed as medseg_cli: parse, call one library function, print."""
