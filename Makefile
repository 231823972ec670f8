# make demo      see keepd work, in a directory of its own
# make test      install what is missing, then every format check, lint and test
# make fuzz      libFuzzer on everything that reads what others wrote, FUZZ_SECONDS= each (docs/fuzzing.md)
# make build     the release binaries
# make bench     keepd beside the other programs of the field (hours; see bench/run.sh), make bench-parts: its parts alone
# make install   PREFIX=/usr/local DESTDIR= ; builds only what is not built yet, so that root need not have cargo
# make uninstall takes away what install put there, but neither configuration nor state
# make clean

PREFIX     = /usr/local
DESTDIR    =
BINDIR     = $(PREFIX)/bin
LIBDIR     = $(PREFIX)/lib
SHAREDIR   = $(PREFIX)/share
DOCDIR     = $(SHAREDIR)/doc/keepd
MANDIR     = $(SHAREDIR)/man
SYSCONFDIR = /etc
UNITDIR    = $(LIBDIR)/systemd/system
CARGO      = cargo
# Where install takes the binaries from.
BINARIES   = target/release

SHELL = /bin/sh
FILL  = @sed -e 's|@BINDIR@|$(BINDIR)|g' -e 's|@DOCDIR@|$(DOCDIR)|g'
# systemd of the machine installed on, and whether that is this one, running.
HERE  = [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]

.PHONY: build demo test fuzz bench bench-parts tools install uninstall clean

build:
	$(CARGO) build --release --locked --workspace --bins

demo: tools-demo build
	sh demo/demo.sh target/release

test: tools
	sh tests/all.sh

bench:
	sh bench/run.sh

fuzz:
	sh fuzz/run.sh

bench-parts:
	$(CARGO) bench --locked --bench parts

.PHONY: tools-demo
tools:
	sh tests/install-tools.sh test
tools-demo:
	sh tests/install-tools.sh demo

$(BINARIES)/keepd $(BINARIES)/keepctl:
	$(MAKE) build

install: $(BINARIES)/keepd $(BINARIES)/keepctl
	install -d "$(DESTDIR)$(BINDIR)" "$(DESTDIR)$(UNITDIR)" "$(DESTDIR)$(LIBDIR)/sysusers.d" "$(DESTDIR)$(LIBDIR)/tmpfiles.d" "$(DESTDIR)$(DOCDIR)"
	install -m 0755 $(BINARIES)/keepd $(BINARIES)/keepctl "$(DESTDIR)$(BINDIR)/"
	$(FILL) systemd/keepd.service >"$(DESTDIR)$(UNITDIR)/keepd.service"
	$(FILL) systemd/keepd.socket >"$(DESTDIR)$(UNITDIR)/keepd.socket"
	$(FILL) systemd/keepd-before-253.conf >"$(DESTDIR)$(DOCDIR)/keepd-before-253.conf"
	install -m 0644 systemd/keepd-in-place.conf "$(DESTDIR)$(DOCDIR)/keepd-in-place.conf"
	@chmod 0644 "$(DESTDIR)$(UNITDIR)/keepd.service" "$(DESTDIR)$(UNITDIR)/keepd.socket" "$(DESTDIR)$(DOCDIR)/keepd-before-253.conf"
	install -m 0644 systemd/keepd.sysusers "$(DESTDIR)$(LIBDIR)/sysusers.d/keepd.conf"
	install -m 0644 systemd/keepd.tmpfiles "$(DESTDIR)$(LIBDIR)/tmpfiles.d/keepd.conf"
	@# Completions come from the program itself, so that they never differ from it.
	@set -e; put() { install -d "$$(dirname "$$2")"; "$(BINARIES)/keepctl" completion "$$1" >"$$2"; chmod 0644 "$$2"; echo "completion for $$1: $$2"; }; \
	  put bash "$(DESTDIR)$(SHAREDIR)/bash-completion/completions/keepctl"; \
	  put zsh "$(DESTDIR)$(SHAREDIR)/zsh/site-functions/_keepctl"; \
	  put fish "$(DESTDIR)$(SHAREDIR)/fish/vendor_completions.d/keepctl.fish"
	@for file in README.md CHANGELOG.md docs/*.md; do [ ! -e "$$file" ] || install -m 0644 "$$file" "$(DESTDIR)$(DOCDIR)/"; done
	install -d "$(DESTDIR)$(DOCDIR)/plugins"
	install -m 0755 config/plugins/directory.py "$(DESTDIR)$(DOCDIR)/plugins/"
	@# The manual pages come from the programs, too.
	@install -d "$(DESTDIR)$(MANDIR)/man1" "$(DESTDIR)$(MANDIR)/man8"
	$(BINARIES)/keepctl manual >"$(DESTDIR)$(MANDIR)/man1/keepctl.1"
	$(BINARIES)/keepd manual >"$(DESTDIR)$(MANDIR)/man8/keepd.8"
	@chmod 0644 "$(DESTDIR)$(MANDIR)/man1/keepctl.1" "$(DESTDIR)$(MANDIR)/man8/keepd.8"
	@# A configuration that somebody wrote is never touched.
	@install -d -m 0750 "$(DESTDIR)$(SYSCONFDIR)/keepd" "$(DESTDIR)$(SYSCONFDIR)/keepd/conf.d"; install -d -m 0700 "$(DESTDIR)$(SYSCONFDIR)/keepd/keys"
	@if [ -e config/keepd.toml ]; then \
	  install -m 0640 config/keepd.toml "$(DESTDIR)$(SYSCONFDIR)/keepd/keepd.toml.sample"; \
	  [ -e "$(DESTDIR)$(SYSCONFDIR)/keepd/keepd.toml" ] || install -m 0640 config/keepd.toml "$(DESTDIR)$(SYSCONFDIR)/keepd/keepd.toml"; fi
	@if $(HERE); then \
	  if [ "$$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')" -lt 253 ]; then \
	    install -Dm 0644 "$(DOCDIR)/keepd-before-253.conf" "$(UNITDIR)/keepd.service.d/before-253.conf"; fi; \
	  systemd-sysusers; systemd-tmpfiles --create; systemctl daemon-reload; \
	  echo; echo "Installed. Next:"; \
	  echo "  keepd key generate $(SYSCONFDIR)/keepd/keys/main.key   # and keep a copy elsewhere"; \
	  echo "  \$$EDITOR $(SYSCONFDIR)/keepd/keepd.toml && keepd --check"; \
	  echo "  systemctl enable --now keepd.socket keepd.service && keepctl status"; fi

uninstall:
	@if $(HERE); then systemctl disable --now keepd.socket keepd.service 2>/dev/null || true; fi
	rm -f "$(DESTDIR)$(BINDIR)/keepd" "$(DESTDIR)$(BINDIR)/keepctl"
	rm -f "$(DESTDIR)$(UNITDIR)/keepd.service" "$(DESTDIR)$(UNITDIR)/keepd.socket" "$(DESTDIR)$(UNITDIR)/keepd.service.d/before-253.conf"
	-@rmdir "$(DESTDIR)$(UNITDIR)/keepd.service.d" 2>/dev/null
	rm -f "$(DESTDIR)$(LIBDIR)/sysusers.d/keepd.conf" "$(DESTDIR)$(LIBDIR)/tmpfiles.d/keepd.conf"
	rm -f "$(DESTDIR)$(SHAREDIR)/bash-completion/completions/keepctl" "$(DESTDIR)$(SHAREDIR)/zsh/site-functions/_keepctl" "$(DESTDIR)$(SHAREDIR)/fish/vendor_completions.d/keepctl.fish"
	rm -rf "$(DESTDIR)$(DOCDIR)"
	rm -f "$(DESTDIR)$(MANDIR)/man1/keepctl.1" "$(DESTDIR)$(MANDIR)/man8/keepd.8"
	@if $(HERE); then systemctl daemon-reload; fi
	@echo "Left alone: $(DESTDIR)$(SYSCONFDIR)/keepd, /var/lib/keepd and every backup."

clean:
	$(CARGO) clean
	rm -rf .venv bench/.peers bench/.work
