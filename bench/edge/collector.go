package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// queue is the part of the exporter that keeps data on disk. It has room for all that
// a cell sends, counted in requests, and a sender would wait rather than be refused.
const queue = `      enabled: true
      storage: file_storage
      queue_size: 1000000
      block_on_overflow: true
`

// startCollector starts a collector and behind it a server that discards. With the
// batch processor, which is how its documentation has long put a pipeline together,
// a request is answered when it is in that processor's memory. Without, it is
// answered when the exporter's queue has written it, which is what an edge promises,
// and the queue makes batches on the way out.
func (b *bench) startCollector(ctx context.Context, fsync, batchProcessor bool) (*running, error) {
	r := &running{}
	err := func() error {
		dir, err := r.newDir(b.dir)
		if err != nil {
			return err
		}
		r.store = filepath.Join(dir, "queue")
		var next string
		for _, addr := range []*string{&r.otlp, &next} {
			if *addr, err = freeAddr(); err != nil {
				return err
			}
		}
		if r.behind, err = b.startChild(ctx, roleDiscard, next); err != nil {
			return err
		}
		r.passed = r.behind.ask
		path := filepath.Join(dir, "collector.yaml")
		if err := os.WriteFile(path, []byte(b.collectorConfig(r.store, r.otlp, next, fsync, batchProcessor)), 0o600); err != nil {
			return err
		}
		if r.measured, err = b.startProcess("collector", b.peerBin, "--config", "file:"+path); err != nil {
			return err
		}
		return r.measured.await(ctx, startTimeout, func() error { return listens(r.otlp) })
	}()
	if err != nil {
		r.stop()
	}
	return r, err
}

// collectorConfig stamps as the edge does. Where the settings differ from the
// defaults, it is so that nothing is refused, dropped or counted in metrics.
func (b *bench) collectorConfig(store, listen, next string, fsync, batchProcessor bool) string {
	processors, queue := "memory_limiter, resource", queue
	if batchProcessor {
		processors += ", batch"
	} else if b.queueBatch {
		queue += "      batch: {}\n"
	}
	return fmt.Sprintf(`extensions:
  file_storage:
    directory: %q
    create_directory: true
    timeout: 10s
    fsync: %t
receivers:
  otlp: {protocols: {%s: {endpoint: %q}}}
processors:
  memory_limiter: {check_interval: 1s, limit_mib: 2000, spike_limit_mib: 400}
  resource:
    attributes:
      - {key: instance.id, value: %q, action: upsert}
      - {key: instance.name, value: %q, action: upsert}
      - {key: customer.id, value: %q, action: upsert}
      - {key: service.namespace, value: %q, action: insert}
  batch: {}
exporters:
  otlp_grpc:
    endpoint: %q
    tls: {insecure: true}
    compression: %s
    timeout: 30s
    retry_on_failure: {max_elapsed_time: 0}
    sending_queue:
%sservice:
  extensions: [file_storage]
  telemetry: {metrics: {level: none}, logs: {level: warn}}
  pipelines:
    traces:
      receivers: [otlp]
      processors: [%s]
      exporters: [otlp_grpc]
`, store, fsync, b.protocol, listen, instanceID, instanceName, customerID, namespace, next, b.compression, queue, processors)
}
