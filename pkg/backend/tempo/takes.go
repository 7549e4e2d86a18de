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

// Takes asks Tempo how old spans may be to be found by a search in their own time: Tempo also accepts
// those beyond ingestion_time_range_slack, but indexes their block under the current time.
func (w *Writer) Takes(ctx context.Context, since, now time.Time) (ok bool, text string, err error) {
	if w.status == nil {
		return true, fmt.Sprintf(remark, "ingestion_time_range_slack") + " (2m by default; set tempo.status_url to have this checked)", nil
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

const remark = "tempo accepts spans of any age, but a search by time finds those older than %s only under the time of their arrival"

// status is the relevant part of Tempo's configuration.
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

// slackOf returns the effective slack in a page of Tempo's configuration, and its key: the smallest of
// those in use.
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

// parse finds the configuration on the page. Tempo prints a line with the request before it, which
// parses as a separate document.
func parse(page []byte) (cfg status, err error) {
	docs := yaml.NewDecoder(bytes.NewReader(page))
	for {
		var doc yaml.Node
		switch err := docs.Decode(&doc); {
		case errors.Is(err, io.EOF):
			return cfg, errors.New("not found on the page")
		case err != nil:
			return cfg, err
		}
		if len(doc.Content) == 1 && doc.Content[0].Kind == yaml.MappingNode {
			return cfg, doc.Decode(&cfg)
		}
	}
}

type slack struct{ key, text string }

// slacks returns the keys that the writers of blocks use. The page shows all keys that Tempo knows, with
// their defaults.
//
//   - Tempo 2: the ingesters. Its last versions also have the sections of Tempo 3, which are used
//     when spans also go through Kafka.
//   - Tempo 3: the live stores; in a single binary they write all blocks, otherwise the block
//     builders write the permanent ones.
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

// fallback is the key to set if none is on the page.
func (c status) fallback() string {
	if c.Ingester != nil {
		return keyStorage
	}
	return keyLiveStore + " (Tempo 2: " + keyStorage + ")"
}
