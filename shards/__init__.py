"""Images at rest and in motion: build, index, order, stream, decode. Imports neither pipeline nor launch."""
