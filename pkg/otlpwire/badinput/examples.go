package badinput

// Examples returns a sound OTLP/JSON request for each signal, after the examples of
// the OTLP project: every kind of value, point and ID in the spelling of the
// specification. What is bad is measured against what is good.
func Examples() map[string]string {
	return map[string]string{
		traces: `{"resourceSpans":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"shop"}},{"key":"list","value":{"arrayValue":{"values":[{"intValue":"7"},{"boolValue":true},{"doubleValue":0.25}]}}}]},
			"schemaUrl":"https://example.com/1","scopeSpans":[{"scope":{"name":"lib","version":"1.0","attributes":[{"key":"s","value":{"bytesValue":"AP8="}}]},"spans":[
			{"traceId":"5B8EFFF798038103D269B633813FC60C","spanId":"EEE19B7EC3C1B174","parentSpanId":"EEE19B7EC3C1B173","traceState":"a=b","flags":257,"name":"GET /","kind":2,
			 "startTimeUnixNano":"1544712660000000000","endTimeUnixNano":1544712661000000000,"droppedAttributesCount":3,
			 "attributes":[{"key":"map","value":{"kvlistValue":{"values":[{"key":"k","value":{"stringValue":"v\u00e9\n"}}]}}}],
			 "events":[{"timeUnixNano":"1544712660500000000","name":"e","attributes":[]}],"links":[{"traceId":"5b8efff798038103d269b633813fc60d","spanId":"eee19b7ec3c1b175"}],
			 "status":{"code":2,"message":"no"},"unknown":{"x":[1,2]}}]}]}]}`,
		metrics: `{"resourceMetrics":[{"resource":{},"scopeMetrics":[{"scope":{"name":"lib"},"metrics":[
			{"name":"c","unit":"1","description":"d","sum":{"aggregationTemporality":2,"isMonotonic":true,"dataPoints":[{"asDouble":5,"startTimeUnixNano":"1","timeUnixNano":"2","attributes":[{"key":"a","value":{"stringValue":"b"}}],"flags":1}]}},
			{"name":"g","gauge":{"dataPoints":[{"asInt":"-10","timeUnixNano":"2","exemplars":[{"asInt":"3","traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174","timeUnixNano":"1"}]}]}},
			{"name":"h","histogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"2","count":"2","sum":2.5,"bucketCounts":["1","1"],"explicitBounds":[1],"min":0,"max":2}]}},
			{"name":"e","exponentialHistogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"2","count":"3","sum":10,"scale":-1,"zeroCount":"1","positive":{"offset":-1,"bucketCounts":["0","2"]},"zeroThreshold":0.5}]}},
			{"name":"s","summary":{"dataPoints":[{"timeUnixNano":"2","count":"3","sum":10,"quantileValues":[{"quantile":0.5,"value":4}]}]}}]}]}]}`,
		logs: `{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"timeUnixNano":"1","observedTimeUnixNano":"2","severityNumber":10,"severityText":"Information","traceId":"5B8EFFF798038103D269B633813FC60C",
			"spanId":"EEE19B7EC3C1B174","body":{"kvlistValue":{"values":[{"key":"a","value":{"doubleValue":"NaN"}}]}},"eventName":"ev","flags":1,"attributes":[{"key":"b","value":{"boolValue":false}}]}]}]}]}`,
	}
}
