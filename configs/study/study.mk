# make study: the trainings, lesions and pruning grids behind the results that the repository keeps.
#
#   make study STUDY_DATA=DIR           # DIR holds cifar100/ (or cifar-100-python/) and tiny-imagenet-200/
#   make study STUDY_DATA=DIR JOBS=2    # two at once, of one thread each
#   make study STUDY_DATA=DIR TOY=1     # every command on a few images, in minutes: does all of it run?
#   make study STUDY_DATA=DIR WIDTH=1 STUDY_NETWORKS=resnet18   # at full width, or any other; one seed, 15 epochs
#   make study-status                   # what is done, and what is not
#
# Measured with JOBS=2 on two cores with bf16 units: VGG-16 68 minutes, ResNet-18 about 1 hour 45, MobileNetV2 50 without
# the last two steps (it was run through them at half width alone). Without bf16 units add
# STUDY_FIT="--trainer.precision 32-true" STUDY_TEST="--trainer.precision 32-true", and expect trainings to take two to
# four times as long.
# minutes a seed        fit  lesion  protocol  compensation  selection  polish
#   resnet18           18.4     3.9       5.1           2.6       20.0     7.8
#   vgg16_bn           13.5     1.6       4.3           4.7       12.9     4.5
#   mobilenet_v2       22.4     3.9       4.1           4.2          –       –
# and 9 minutes a seed for tiny_resnet18, 11 for tiny_convnext. At full width, with OMP_NUM_THREADS=2 on both cores, an epoch of
# ResNet-18 takes 8 minutes with its measurement; selection takes 36 minutes of processor time, and polish about 50 for each
# of its two budgets.
#
# It skips what is done, goes on where it was interrupted, and starts a training anew that never reached its first
# checkpoint. A step is done when its .done file is there; to repeat one, remove that (of a training: the run's folder).
# Each run's output is in $(STUDY)/logs.

STUDY_DATA ?= data
JOBS ?= 1
STUDY ?= runs/study$(if $(WIDTH),-width_$(WIDTH))$(if $(TOY),-toy)
STUDY_TABLES ?= $(if $(TOY),$(STUDY)/tables,notebooks/results/study$(if $(WIDTH),/width_$(WIDTH)))
STUDY_SEEDS ?= 0 $(if $(WIDTH),,1 2)
STUDY_NETWORKS ?= resnet18 vgg16_bn mobilenet_v2
# no lesions and no pruning: whether what the others show is seen on other data; and a pilot of one seed
STUDY_SEEDS_tiny_convnext ?= 0
STUDY_EXTRA ?= $(if $(WIDTH),,tiny_resnet18 tiny_convnext)

# What each step is asked for; with TOY, as little as shows that it runs.
STUDY_ARGS ?= --trainer.enable_progress_bar false --trainer.enable_model_summary false --data.root $(STUDY_DATA) \
	$(if $(STUDY_CACHE),--data.cache_dir $(STUDY_CACHE))
STUDY_CACHE ?= $(STUDY)/cache
ifdef TOY
STUDY_FIT ?= --trainer.max_epochs 2 --trainer.limit_train_batches 3 --trainer.log_every_n_steps 1 --data.batch_size 16 \
	--trainer.precision 32-true --trainer.callbacks.init_args.probe_size 40
# (a limit of 1 batch would mean the share 1.0, all of them)
STUDY_TEST ?= --trainer.precision 32-true --trainer.limit_test_batches 2 --data.batch_size 16
STUDY_LESION ?= --channels 3 --operations '["zero","mean","peer"]' --probe_size 40 --layers '["*conv1","*features.1*"]' \
	--scores '["l1"]' $(STUDY_TEST)
STUDY_PROTOCOL ?= --scores '["input_capture","task_information","random","l1"]' --compensate '[false]' \
	--budgets '[0.8]' --probe_size 40 $(STUDY_TEST)
STUDY_COMPENSATION ?= --scores '["l1"]' --compensate '[false,"refit"]' --budgets '[0.8]' \
	--allocations '["uniform"]' --probe_size 40 $(STUDY_TEST)
STUDY_SELECTION ?= --scores '["reconstruction","l1"]' --allocations '["uniform","sensitivity"]' \
	--compensate '[false,"refit"]' --budgets '[0.8]' --probe_size 40 $(STUDY_TEST)
STUDY_POLISH ?= --scores '["reconstruction"]' --allocations '["sensitivity"]' --compensate '["refit"]' \
	--budgets '[0.8]' --probe_size 40 $(STUDY_TEST)
STUDY_REPORT ?= --resamples 20
else
STUDY_FIT ?=
STUDY_TEST ?=
ifdef WIDTH
# Longer, for wider networks learn more; a smaller probe, fewer lesions and refits, for they take up to 16 times as long.
STUDY_FIT_WIDTH ?= --trainer.max_epochs 15 --model.init_args.lr 0.1 --trainer.callbacks.init_args.probe_size 2000
STUDY_LESION ?= --channels 8 --operations '["zero"]' --evaluation_size 2500
STUDY_SELECTION ?= --scores '["reconstruction","l1"]' --allocations '["uniform","sensitivity"]' \
	--compensate '[false,"refit"]' --budgets '[0.5,0.3]' --evaluation_size 5000 --trainer.precision 32-true
STUDY_STEPS ?= test lesion selection polish
endif
# the same 16 channels of each layer in every seed, on 500 test images
STUDY_LESION ?= --channels 16 --operations '["zero","mean","peer"]' --evaluation_size 500
# every score, nothing compensated
STUDY_PROTOCOL ?= --compensate '[false]' --budgets '[0.9,0.8,0.7,0.5]' --evaluation_size 2000
STUDY_COMPENSATION ?= --compensate '[false,"refit"]' --budgets '[0.7,0.5,0.3]' --allocations '["uniform"]' \
	--scores '["l1","input_capture","task_information","keep_both","taylor","random"]' --evaluation_size 2000
# joint selection beside the others, under even cuts and measured ones, and what the default gains by polish
STUDY_SELECTION ?= --scores '["reconstruction","l1","input_capture","minus_peer_r2","task_information","random"]' \
	--allocations '["uniform","sensitivity"]' --compensate '[false,"refit"]' --budgets '[0.7,0.5,0.3,0.2]' \
	--evaluation_size 5000 --trainer.precision 32-true
STUDY_POLISH ?= --scores '["reconstruction"]' --allocations '["sensitivity"]' --compensate '["distill"]' \
	--budgets '[0.5,0.3]' --evaluation_size 5000 --trainer.precision 32-true
# 53 convolutions, and three to eight times the others' time an image
STUDY_LESION_mobilenet_v2 ?= --channels 6
STUDY_PRUNE_mobilenet_v2 ?= --evaluation_size 1000
STUDY_REPORT ?=
endif
ifdef WIDTH
STUDY_FIT_WIDTH += --model.init_args.width $(WIDTH)
endif

STUDY_STEPS ?= test lesion protocol compensation selection polish
STUDY_SEEDED := $(foreach network,$(STUDY_NETWORKS),$(STUDY_SEEDS:%=$(network)/seed_%))
study_extra = $(patsubst %,$(1)/seed_%,$(or $(STUDY_SEEDS_$(1)),$(STUDY_SEEDS)))
STUDY_RUNS := $(STUDY_SEEDED) $(foreach network,$(STUDY_EXTRA),$(call study_extra,$(network)))
STUDY_DONE = $(foreach network,$(STUDY_NETWORKS),$(patsubst %,$(STUDY)/$(network)/%.done,$(STUDY_SEEDS:%=seed_%/fit) \
	$(foreach seed,$(STUDY_SEEDS),$(STUDY_STEPS:%=seed_$(seed)/%)) tables)) \
	$(foreach network,$(STUDY_EXTRA),$(foreach run,$(call study_extra,$(network)),$(STUDY)/$(run)/fit.done \
	$(STUDY)/$(run)/test.done) $(STUDY)/$(network)/tables.done)

.PHONY: study study-networks study-steps study-status
# Only one at a time: a training whose make was killed lives on, and holds the lock until it has ended.
study: .venv/.ready
	@mkdir -p $(STUDY)/logs
	@$(if $(shell command -v flock),flock -n -E 75 $(STUDY)/lock) $(MAKE) --no-print-directory study-networks || { \
		code=$$?; test $$code -ne 75 || echo "another make study is at work in $(STUDY), or a step of one that was killed: \
	see $(STUDY)/logs"; exit $$code; }

# One network after the other, so that its tables are there before the next is trained: make would train them all first.
study_make = $(MAKE) --no-print-directory --keep-going --jobs $(JOBS) study-steps STUDY_NETWORKS="$(1)" STUDY_EXTRA="$(2)"
study-networks:
	+@failed=0; $(foreach network,$(STUDY_NETWORKS),$(call study_make,$(network)) || failed=1;) \
		$(call study_make,,$(STUDY_EXTRA)) || failed=1; exit $$failed

study-steps: $(STUDY_DONE)
	@echo "study: done: $(STUDY_NETWORKS) $(STUDY_EXTRA); tables in $(STUDY_TABLES)"

study-status:
	@for step in $(STUDY_DONE); do test -f $$step && echo "done     $$step" || echo "missing  $$step"; done

# The run's folder, its parts, and a line at the beginning and end of every step.
study_run = $(@D)
study_name = $(notdir $(patsubst %/,%,$(dir $(study_run))))
study_seed = $(patsubst seed_%,%,$(notdir $(study_run)))
study_log = $(STUDY)/logs/$(subst /,-,$(patsubst $(STUDY)/%.done,%,$@)).log
study_config = --config configs/study/$(study_name).yaml --run $(study_run)
# $(call study_step,COMMAND): run it, say how long it took, and mark the step as done.
define study_step
@echo "study: $@"
@begin=$$(date +%s); { $(1); } >>$(study_log) 2>&1 </dev/null \
	|| { tail -n 15 $(study_log); echo "study: $@ failed; all of its output: $(study_log)"; exit 1; }; \
	touch $@; echo "study: $@ after $$(($$(date +%s) - begin)) s"
endef
# glibc hands large tensors back to the system after every operation and fetches them again page by page. With these it
# keeps them, which takes 22 % off a training step of half-width MobileNetV2, and nothing off quarter-width ResNet-18
# (float32, one thread of a CPU with AVX-512). Other allocators ignore them.
STUDY_MALLOC ?= MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
chanaxes = $(STUDY_MALLOC) WANDB_MODE=offline $(BIN)/chanaxes

$(STUDY_RUNS:%=$(STUDY)/%/fit.done):
	@test -f $(study_run)/checkpoints/last.ckpt || rm -rf $(study_run)
	@mkdir -p $(study_run) $(STUDY)/logs
	$(call study_step,$(chanaxes) fit $(study_config) --seed_everything $(study_seed) $(STUDY_ARGS) $(STUDY_FIT_WIDTH) $(STUDY_FIT))

$(STUDY_RUNS:%=$(STUDY)/%/test.done): %/test.done: %/fit.done
	$(call study_step,$(chanaxes) test $(study_config) $(STUDY_ARGS) $(STUDY_TEST))

$(STUDY_SEEDED:%=$(STUDY)/%/lesion.done): %/lesion.done: %/fit.done
	$(call study_step,$(chanaxes) lesion $(study_config) $(STUDY_ARGS) $(STUDY_LESION) \
		$(STUDY_LESION_$(study_name)) --out $(study_run)/lesion)

$(STUDY_SEEDED:%=$(STUDY)/%/protocol.done): %/protocol.done: %/fit.done
	$(call study_step,$(chanaxes) prune $(study_config) $(STUDY_ARGS) $(STUDY_PROTOCOL) \
		$(STUDY_PRUNE_$(study_name)) --out $(study_run)/protocol)

$(STUDY_SEEDED:%=$(STUDY)/%/compensation.done): %/compensation.done: %/fit.done
	$(call study_step,$(chanaxes) prune $(study_config) $(STUDY_ARGS) $(STUDY_COMPENSATION) \
		$(STUDY_PRUNE_$(study_name)) --out $(study_run)/compensation)

$(STUDY_SEEDED:%=$(STUDY)/%/selection.done): %/selection.done: %/fit.done
	$(call study_step,$(chanaxes) prune $(study_config) $(STUDY_ARGS) $(STUDY_SELECTION) \
		$(STUDY_PRUNE_$(study_name)) --out $(study_run)/selection)

$(STUDY_SEEDED:%=$(STUDY)/%/polish.done): %/polish.done: %/fit.done
	$(call study_step,$(chanaxes) prune $(study_config) $(STUDY_ARGS) $(STUDY_POLISH) \
		$(STUDY_PRUNE_$(study_name)) --out $(study_run)/polish)

# One report a network, over its seeds; the tables behind the study's claims are kept, the rest can be made again.
# Notebook 05 reads the grids in $(STUDY_TABLES)/NETWORK/seed_*/protocol/pruning.parquet.
study_tables = $(STUDY_TABLES)/$(notdir $(@D))
study_runs = $(patsubst %/test.done,%,$(filter %/test.done,$^))

define study_collect
rm -rf $(study_tables) && mkdir -p $(study_tables) && cd $(@D) \
	&& for table in accuracy groupings alignment; do \
		test ! -f report/$$table.csv || cp report/$$table.csv $(abspath $(study_tables)) || exit 1; done \
	&& gzip -9nc report/correlations.csv >$(abspath $(study_tables))/correlations.csv.gz \
	&& for table in seed_*/lesion/lesions.parquet seed_*/*/pruning.parquet; do test ! -f $$table || { \
		mkdir -p $(abspath $(study_tables))/$${table%/*} && cp $$table $(abspath $(study_tables))/$$table; } || exit 1; done
endef

$(foreach network,$(STUDY_NETWORKS),$(eval $(STUDY)/$(network)/tables.done: $(foreach \
	seed,$(STUDY_SEEDS),$(STUDY_STEPS:%=$(STUDY)/$(network)/seed_$(seed)/%.done))))
$(foreach network,$(STUDY_EXTRA),$(eval $(STUDY)/$(network)/tables.done: $(patsubst \
	%,$(STUDY)/%/test.done,$(call study_extra,$(network)))))
$(patsubst %,$(STUDY)/%/tables.done,$(STUDY_NETWORKS) $(STUDY_EXTRA)):
	$(call study_step,$(chanaxes) report $(study_runs) --out $(@D)/report $(STUDY_REPORT) && ($(study_collect)))
