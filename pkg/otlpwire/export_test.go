package otlpwire

// AddSeed gives the fuzz targets a request to start from.
func AddSeed(sig Signal, payload []byte) {
	generatorSeeds[sig] = append(generatorSeeds[sig], payload)
}
