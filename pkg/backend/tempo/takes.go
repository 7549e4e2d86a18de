package tempo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v3"
)

const statusPath = "/status/config"

// Takes asks Tempo how old spans may be to be found by a search in their time: those
// beyond ingestion_time_range_slack it takes, too, but files their block under now.
func (w *Writer) Takes(ctx context.Context, since, now time.Time) (ok bool, text string, err error) {
	if w.status == nil {
		return true, fmt.Sprintf(remark, "ingestion_time_range_slack") + " (2m by default; with tempo.status_url it is asked)", nil
	}
	page, err := w.status.Get(ctx, statusPath, statusPath)
	if err != nil {
		return false, "", err
	}
	key, slack, err := slackOf(page)
	if err != nil {
		return false, "", err
	}
	if age := now.Sub(since); slack < age {
		return false, fmt.Sprintf(remark+": it is %v, and these are %v old", key, model.Duration(slack), age.Round(time.Second)), nil
	}
	return true, "", nil
}

const remark = "tempo takes spans of any age, but a search by time finds those older than %s under the time at which they came"

// status is what counts of Tempo's configuration.
type status struct {
	Target      string     `yaml:"target"`
	Ingester    *yaml.Node `yaml:"ingester"` // Tempo 3 has none
	Distributor struct {
		Kafka bool `yaml:"kafka_write_path_enabled"`
	} `yaml:"distributor"`
	Storage struct {
		Trace struct {
			WAL wal `yaml:"wal"`
		} `yaml:"trace"`
	} `yaml:"storage"`
	LiveStore struct {
		WAL wal `yaml:"wal"`
	} `yaml:"live_store"`
	BlockBuilder struct {
		WAL wal `yaml:"wal"`
	} `yaml:"block_builder"`
}

type wal struct {
	Slack string `yaml:"ingestion_time_range_slack"`
}

const (
	keyStorage      = "storage.trace.wal.ingestion_time_range_slack"
	keyLiveStore    = "live_store.wal.ingestion_time_range_slack"
	keyBlockBuilder = "block_builder.wal.ingestion_time_range_slack"
)

// slackOf returns the slack that a page of Tempo's configuration says, and its key: the
// smallest of those that count.
func slackOf(page []byte) (key string, slack time.Duration, err error) {
	cfg, err := parse(page)
	if err != nil {
		return "", 0, fmt.Errorf("tempo's configuration: %w", err)
	}
	key, slack = cfg.fallback(), 2*time.Minute
	first := true
	for _, s := range cfg.slacks() {
		if s.text == "" {
			continue
		}
		d, err := model.ParseDuration(s.text)
		if err != nil {
			return "", 0, fmt.Errorf("tempo's %s: %w", s.key, err)
		}
		if first || time.Duration(d) < slack {
			key, slack, first = s.key, time.Duration(d), false
		}
	}
	return key, slack, nil
}

// parse finds the configuration on the page. Tempo prints a line that says what was
// asked before it, which reads as a document of its own.
func parse(page []byte) (cfg status, err error) {
	docs := yaml.NewDecoder(bytes.NewReader(page))
	for {
		var doc yaml.Node
		switch err := docs.Decode(&doc); {
		case errors.Is(err, io.EOF):
			return cfg, errors.New("there is none on the page")
		case err != nil:
			return cfg, err
		}
		if len(doc.Content) == 1 && doc.Content[0].Kind == yaml.MappingNode {
			return cfg, doc.Decode(&cfg)
		}
	}
}

type slack struct{ key, text string }

// slacks returns the keys that whoever writes blocks goes by. The page shows all that
// Tempo knows, with their defaults.
//
//   - Tempo 2: the ingesters. Its last versions have the sections of Tempo 3, which count
//     when spans also go through Kafka.
//   - Tempo 3: the live stores; in a single binary they write all blocks, else the
//     block builders write those that last.
func (c status) slacks() []slack {
	var (
		storage = slack{keyStorage, c.Storage.Trace.WAL.Slack}
		live    = slack{keyLiveStore, c.LiveStore.WAL.Slack}
		builder = slack{keyBlockBuilder, c.BlockBuilder.WAL.Slack}
	)
	switch {
	case c.Ingester != nil && c.Distributor.Kafka:
		return []slack{storage, live, builder}
	case c.Ingester != nil || live.text == "" && builder.text == "":
		return []slack{storage}
	case (c.Target == "" || c.Target == "all") && live.text != "":
		return []slack{live}
	}
	return []slack{live, builder}
}

// fallback is the key to set where none is on the page.
func (c status) fallback() string {
	if c.Ingester != nil {
		return keyStorage
	}
	return keyLiveStore + " (Tempo 2: " + keyStorage + ")"
}
