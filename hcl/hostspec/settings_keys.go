package hostspec

// kind is the type of a setting in config.toml. GitLab Runner refuses to start on any other.
type kind int

const (
	kindText       kind = iota
	kindAddress         // text: HOST:PORT or :PORT
	kindInteger         // a whole number
	kindSeconds         // a whole number, and what it counts
	kindNumber          // a whole number or a fraction
	kindBool            //
	kindDuration        // text for Go's time.ParseDuration; a bare number would be nanoseconds
	kindTextOrList      // text, or a list of it
	kindList            // a list of what elem is
	kindMap             // a table whose keys are free and whose values are what elem is
	kindTable           // a table with the keys in keys
	kindTables          // a list of such tables
	kindAny             // not GitLab Runner's to read
)

// setting is what is known of one key of config.toml.
type setting struct {
	kind     kind
	elem     *setting // of a list or map
	keys     settings // of a table
	portless bool     // an address may lack its port
	values   []string // the only texts that are taken, if not nil
	least    int64    // of a whole number, if not 0: some take -1 for no limit
	secret   bool     // whoever can read the value can use it: a literal is refused, and none is ever shown
	executor string   // the table has an effect with this executor alone, if not ""
	ours     string   // the spec has its own words for it: what to do instead
}

// settings is a table of config.toml by its keys.
type settings map[string]setting

var (
	textSetting     = setting{kind: kindText}
	secretSetting   = setting{kind: kindText, secret: true}
	addressSetting  = setting{kind: kindAddress}
	integerSetting  = setting{kind: kindInteger}
	secondsSetting  = setting{kind: kindSeconds}
	boolSetting     = setting{kind: kindBool}
	durationSetting = setting{kind: kindDuration}
	textsSetting    = listOf(textSetting)
	numbersSetting  = listOf(setting{kind: kindNumber})
	textMapSetting  = mapOf(textSetting)
	pullPolicy      = setting{kind: kindText, values: []string{"always", "if-not-present", "never"}}
)

func listOf(elem setting) setting         { return setting{kind: kindList, elem: &elem} }
func mapOf(elem setting) setting          { return setting{kind: kindMap, elem: &elem} }
func tableOf(keys settings) setting       { return setting{kind: kindTable, keys: keys} }
func tablesOf(keys settings) setting      { return setting{kind: kindTables, keys: keys} }
func oneOfTexts(values ...string) setting { return setting{kind: kindText, values: values} }

// wordsFor is a setting that the spec has its own words for.
func wordsFor(cure string) setting { return setting{kind: kindAny, ours: cure} }

// foreign is the table of an executor that runners here never have.
func foreign(executor string) setting {
	return wordsFor("it belongs to the " + executor + " executor; pools replace it, so omit it")
}

const atGitLab = "it is set in GitLab, where the runner was created"

// runnerVersion is the GitLab Runner that the tables below were read from: the toml tags of Config and RunnerConfig in its
// common/config.go, and what they embed (cache/cacheconfig, helpers/docker, referees, common/config/runner). They are
// described at https://docs.gitlab.com/runner/configuration/advanced-configuration/.
const runnerVersion = "19.4"

// globalSettings are the keys at the top of config.toml: the spec's gitlab_runner block.
var globalSettings = settings{
	"check_interval":     secondsSetting,
	"concurrent":         {kind: kindInteger, least: 1}, // with 0 GitLab Runner exits
	"connection_max_age": durationSetting,
	"experimental": tableOf(settings{
		"usage_logger": tableOf(settings{
			"enabled":          boolSetting,
			"labels":           textMapSetting,
			"log_dir":          textSetting,
			"logrotate":        tableOf(settings{"labels": textMapSetting, "log_dir": textSetting, "max_backup_files": integerSetting, "max_rotation_age": durationSetting}),
			"max_backup_files": integerSetting,
			"max_rotation_age": durationSetting,
			"snowplow_billing": tableOf(settings{
				"app_id": textSetting, "batch_delivery_duration_buckets": numbersSetting, "category": textSetting, "collector_uri": textSetting,
				"deployment_type": textSetting, "enable_oidc": boolSetting, "metadata": textMapSetting, "realm": textSetting,
				"skip_oidc_if_unsupported_cloud": boolSetting, "skip_runner_system_failure": boolSetting,
			}),
			"writers": textsSetting,
		}),
	}),
	"labels":         textMapSetting,
	"listen_address": {kind: kindAddress, portless: true}, // 9252 then
	"log_format":     oneOfTexts("runner", "text", "json"),
	"log_level":      oneOfTexts("debug", "info", "warn", "error", "fatal", "panic", "trace", "warning"),
	"machine":        foreign("docker+machine"),
	"runners":        wordsFor("write runner blocks"),
	"sentry_dsn":     textSetting,
	"session_server": tableOf(settings{
		"advertise_address": addressSetting, "listen_address": addressSetting, "session_timeout": secondsSetting,
	}),
	"shutdown_timeout": secondsSetting,
	"user":             textSetting,
}

// connectorSettings are the keys of connector_config.
var connectorSettings = settings{
	"arch": textSetting, "keepalive": durationSetting, "key_path": textSetting, "os": textSetting, "password": secretSetting,
	"protocol": textSetting, "protocol_port": integerSetting, "timeout": durationSetting, "use_external_addr": boolSetting,
	"use_static_credentials": boolSetting, "username": textSetting,
}

// runnerSettings are the keys of a [[runners]] section: a runner's settings.
var runnerSettings = settings{
	"artifact": tableOf(settings{"response_header_timeout": durationSetting, "upload_timeout": durationSetting}),
	"autoscaler": tableOf(settings{
		"capacity_per_instance":            wordsFor("write capacity_per_instance = … in the runner block"),
		"connector_config":                 tableOf(connectorSettings),
		"delete_instances_on_shutdown":     boolSetting,
		"deletion_retry_interval":          durationSetting,
		"failure_threshold":                integerSetting,
		"instance_acquire_timeout":         durationSetting,
		"instance_creation_time_buckets":   numbersSetting,
		"instance_deletion_time_buckets":   numbersSetting,
		"instance_is_running_time_buckets": numbersSetting,
		"instance_life_duration_buckets":   numbersSetting,
		"instance_operation_time_buckets":  numbersSetting,
		"instance_readiness_time_buckets":  numbersSetting,
		"instance_ready_command":           textSetting,
		"log_external_ip":                  boolSetting,
		"log_internal_ip":                  boolSetting,
		"max_instances":                    wordsFor("write max_instances = … in the pool block"),
		"max_use_count":                    wordsFor("write max_use_count = … in the runner block"),
		"plugin":                           wordsFor("fleetingd is the plugin"),
		"plugin_config":                    wordsFor("fleetingd writes it"),
		"policy":                           wordsFor("write policy { … } blocks in the runner block"),
		"reservation_throttling":           boolSetting,
		"scale_throttle":                   tableOf(settings{"burst": integerSetting, "limit": integerSetting}),
		"shutdown_deletion_interval":       durationSetting,
		"shutdown_deletion_retries":        integerSetting,
		"state_storage":                    tableOf(settings{"dir": textSetting, "enabled": boolSetting, "keep_instance_with_acquisitions": boolSetting}),
		"update_interval":                  durationSetting,
		"update_interval_when_expecting":   durationSetting,
		"vm_isolation": tableOf(settings{
			"connector_config": tableOf(connectorSettings), "enabled": boolSetting, "image": textSetting,
			"nesting_config": mapOf(setting{kind: kindAny}), "nesting_host": textSetting,
		}),
	}),
	"builds_dir": textSetting,
	"cache": tableOf(settings{
		"MaxUploadedArchiveSize": integerSetting,
		"Path":                   textSetting,
		"Shared":                 boolSetting,
		"Type":                   oneOfTexts("s3", "gcs", "azure", "s3v2", "gcsv2"),
		"azure":                  tableOf(settings{"AccountKey": secretSetting, "AccountName": textSetting, "ContainerName": textSetting, "StorageDomain": textSetting}),
		"gcs": tableOf(settings{
			"AccessID": textSetting, "BucketName": textSetting, "CredentialsFile": textSetting, "PrivateKey": secretSetting, "UniverseDomain": textSetting,
		}),
		"s3": tableOf(settings{
			"Accelerate": boolSetting, "AccessKey": textSetting, "AssumeRoleMaxConcurrency": integerSetting, "AuthenticationType": textSetting,
			"BucketLocation": textSetting, "BucketName": textSetting, "DisableAssumeRoleCredentialsCaching": boolSetting, "DualStack": boolSetting,
			"Insecure": boolSetting, "PathStyle": boolSetting, "RoleARN": textSetting, "SecretKey": secretSetting, "ServerAddress": textSetting,
			"ServerSideEncryption": textSetting, "ServerSideEncryptionKeyID": textSetting, "SessionToken": secretSetting, "UploadRoleARN": textSetting,
		}),
	}),
	"cache_dir":            textSetting,
	"clean_git_config":     boolSetting,
	"clone_url":            textSetting,
	"custom":               foreign("custom"),
	"custom_build_dir":     tableOf(settings{"enabled": boolSetting}),
	"debug_trace_disabled": boolSetting,
	"docker":               {kind: kindTable, keys: dockerSettings, executor: "docker-autoscaler"},
	"environment":          textsSetting,
	"executor":             wordsFor("write executor = … in the runner block"),
	"experimental": tableOf(settings{
		"boot_verify": tableOf(settings{
			"acquire_max_backoff": durationSetting, "acquire_min_backoff": durationSetting, "enabled": boolSetting, "timeout": durationSetting,
		}),
	}),
	"feature_flags":       mapOf(boolSetting),
	"get_sources_timeout": durationSetting,
	// GitLab's number for the runner. Environments that were suspended are resumed by it.
	"id":                                  {kind: kindInteger, least: 1},
	"instance":                            {kind: kindTable, executor: "instance", keys: settings{"allowed_images": textsSetting, "use_common_build_dir": boolSetting}},
	"job_status_final_update_retry_limit": integerSetting,
	"kubernetes":                          foreign("kubernetes"),
	"labels":                              textMapSetting,
	"limit":                               integerSetting,
	"machine":                             foreign("docker+machine"),
	"monitoring": tableOf(settings{
		"job_queuing_durations": tablesOf(settings{
			"jobs_running_for_project": textSetting, "periods": textsSetting, "threshold": durationSetting, "timezone": textSetting,
		}),
	}),
	"name":                    wordsFor("it is the runner block's label"),
	"output_limit":            integerSetting,
	"parallels":               foreign("parallels"),
	"post_build_script":       textSetting,
	"post_get_sources_script": textSetting,
	"pre_build_script":        textSetting,
	"pre_get_sources_script":  textSetting,
	"prepare_timeout":         durationSetting,
	"proxy_exec":              boolSetting,
	"referees": tableOf(settings{
		"metrics": tableOf(settings{"prometheus_address": textSetting, "queries": textsSetting, "query_interval": secondsSetting}),
	}),
	"request_concurrency":     integerSetting,
	"safe_directory_checkout": boolSetting,
	"shell":                   oneOfTexts("bash", "sh", "pwsh", "powershell", "cmd", ""),
	"slot_cgroup_template":    textSetting,
	"ssh":                     foreign("ssh"),
	"step_runner_image":       textSetting,
	"strict_check_interval":   boolSetting,
	"tls-ca-file":             textSetting,
	"tls-cert-file":           textSetting,
	"tls-key-file":            textSetting,
	"token":                   wordsFor("write token = … in the runner block"),
	// Options of gitlab-runner register, not keys of config.toml.
	"locked":       wordsFor(atGitLab),
	"run_untagged": wordsFor(atGitLab),
	"tag_list":     wordsFor(atGitLab),
	"tags":         wordsFor(atGitLab),
	// GitLab writes these two down when a runner is registered.
	"token_expires_at":         wordsFor("it comes from a registration, and the spec gives the token"),
	"token_obtained_at":        wordsFor("it comes from a registration, and the spec gives the token"),
	"unhealthy_interval":       durationSetting,
	"unhealthy_requests_limit": integerSetting,
	"url":                      wordsFor("write url = … in the runner block"),
	"use_slot_cgroups":         boolSetting,
	"virtualbox":               foreign("virtualbox"),
}

// dockerSettings are the keys of [runners.docker].
var dockerSettings = settings{
	"allowed_images":               textsSetting,
	"allowed_privileged_images":    textsSetting,
	"allowed_privileged_services":  textsSetting,
	"allowed_pull_policies":        listOf(pullPolicy),
	"allowed_services":             textsSetting,
	"allowed_users":                textsSetting,
	"cache_dir":                    textSetting,
	"cap_add":                      textsSetting,
	"cap_drop":                     textsSetting,
	"cgroup_parent":                textSetting,
	"container_labels":             textMapSetting,
	"cpu_shares":                   integerSetting,
	"cpus":                         textSetting,
	"cpuset_cpus":                  textSetting,
	"cpuset_mems":                  textSetting,
	"device_cgroup_rules":          textsSetting,
	"devices":                      textsSetting,
	"disable_cache":                boolSetting,
	"disable_entrypoint_overwrite": boolSetting,
	"dns":                          textsSetting,
	"dns_search":                   textsSetting,
	"enable_ipv6":                  boolSetting,
	"extra_hosts":                  textsSetting,
	"gpus":                         textSetting,
	"group_add":                    textsSetting,
	"helper_image":                 textSetting,
	"helper_image_flavor":          textSetting,
	"host":                         textSetting,
	"hostname":                     textSetting,
	"image":                        textSetting,
	"ipcmode":                      textSetting,
	"isolation":                    textSetting,
	"links":                        textsSetting,
	"log_options":                  textMapSetting,
	"mac_address":                  textSetting,
	"memory":                       textSetting,
	"memory_reservation":           textSetting,
	"memory_swap":                  textSetting,
	"network_mode":                 textSetting,
	"network_mtu":                  integerSetting,
	"oom_kill_disable":             boolSetting,
	"oom_score_adjust":             integerSetting,
	"pid_mode":                     textSetting,
	"privileged":                   boolSetting,
	"pull_policy":                  {kind: kindTextOrList, values: pullPolicy.values},
	"runtime":                      textSetting,
	"security_opt":                 textsSetting,
	"service_cgroup_parent":        textSetting,
	"service_cpu_shares":           integerSetting,
	"service_cpus":                 textSetting,
	"service_cpuset_cpus":          textSetting,
	"service_gpus":                 textSetting,
	"service_memory":               textSetting,
	"service_memory_reservation":   textSetting,
	"service_memory_swap":          textSetting,
	"service_slot_cgroup_template": textSetting,
	"services": tablesOf(settings{
		"alias": textSetting, "command": textsSetting, "entrypoint": textsSetting, "environment": textsSetting, "name": textSetting,
		"suspend_data_path": textSetting,
	}),
	"services_devices":          mapOf(textsSetting),
	"services_limit":            integerSetting,
	"services_privileged":       boolSetting,
	"services_security_opt":     textsSetting,
	"services_tmpfs":            textMapSetting,
	"shm_size":                  integerSetting,
	"sysctls":                   textMapSetting,
	"tls_cert_path":             textSetting,
	"tls_verify":                boolSetting,
	"tmpfs":                     textMapSetting,
	"ulimit":                    textMapSetting,
	"user":                      textSetting,
	"userns_mode":               textSetting,
	"volume_driver":             textSetting,
	"volume_driver_ops":         textMapSetting,
	"volume_keep":               boolSetting,
	"volumes":                   textsSetting,
	"volumes_from":              textsSetting,
	"wait_for_services_timeout": secondsSetting,
}

// secretNames are the keys of secrets: those of the tables above, and of the tables of other executors.
var secretNames = append(secretsIn(runnerSettings), "bearer_token")

func secretsIn(known settings) []string {
	var names []string
	for key, s := range known {
		if s.secret {
			names = append(names, key)
		}
		names = append(names, secretsIn(s.keys)...)
	}
	return names
}

// featureFlags are GitLab Runner's, from its helpers/featureflags/flags.go.
var featureFlags = []string{
	"FF_CLEAN_UP_FAILED_CACHE_EXTRACT", "FF_CONCRETE", "FF_DISABLE_AUTOMATIC_TOKEN_ROTATION", "FF_DISABLE_POWERSHELL_STDIN",
	"FF_DISABLE_UMASK_FOR_DOCKER_EXECUTOR", "FF_DISABLE_UMASK_FOR_KUBERNETES_EXECUTOR", "FF_ENABLE_BASH_EXIT_CODE_CHECK", "FF_ENABLE_JOB_CLEANUP",
	"FF_ENABLE_JOB_INPUTS_INTERPOLATION", "FF_EXPORT_HIGH_CARDINALITY_METRICS", "FF_GIT_URLS_WITHOUT_TOKENS", "FF_HASH_CACHE_KEYS",
	"FF_KUBERNETES_HONOR_ENTRYPOINT", "FF_LOG_IMAGES_CONFIGURED_FOR_JOB", "FF_MASK_ALL_DEFAULT_TOKENS", "FF_NETWORK_PER_BUILD",
	"FF_POSIXLY_CORRECT_ESCAPES", "FF_PRINT_POD_EVENTS", "FF_RESOLVE_FULL_TLS_CHAIN", "FF_SCRIPT_SECTIONS", "FF_SCRIPT_TO_STEP_MIGRATION",
	"FF_SECRET_RESOLVING_FAILS_IF_MISSING", "FF_SUSPENDABLE_ENVIRONMENTS", "FF_TIMESTAMPS", "FF_USE_ADAPTIVE_REQUEST_CONCURRENCY",
	"FF_USE_ADVANCED_POD_SPEC_CONFIGURATION", "FF_USE_DIRECT_DOWNLOAD", "FF_USE_DOCKER_AUTOSCALER_DIAL_STDIO",
	"FF_USE_DUMB_INIT_WITH_KUBERNETES_EXECUTOR", "FF_USE_DYNAMIC_TRACE_FORCE_SEND_INTERVAL", "FF_USE_EXPONENTIAL_BACKOFF_STAGE_RETRY", "FF_USE_FASTZIP",
	"FF_USE_FLEETING_ACQUIRE_HEARTBEATS", "FF_USE_GITALY_CORRELATION_ID", "FF_USE_GIT_BUNDLE_URIS", "FF_USE_GIT_NATIVE_CLONE",
	"FF_USE_GIT_PROACTIVE_AUTH", "FF_USE_INIT_WITH_DOCKER_EXECUTOR", "FF_USE_JOB_ROUTER", "FF_USE_LEGACY_BASH_EVAL", "FF_USE_LEGACY_GCS_CACHE_ADAPTER",
	"FF_USE_LEGACY_KUBERNETES_EXECUTION_STRATEGY", "FF_USE_LEGACY_S3_CACHE_ADAPTER", "FF_USE_NATIVE_CONTAINER_STOP", "FF_USE_PARALLEL_ARTIFACT_TRANSFER",
	"FF_USE_PARALLEL_CACHE_TRANSFER", "FF_USE_POD_ACTIVE_DEADLINE_SECONDS", "FF_USE_POWERSHELL_PATH_RESOLVER", "FF_USE_WINDOWS_JOB_OBJECT",
	"FF_USE_WINDOWS_LEGACY_PROCESS_STRATEGY", "FF_WAIT_FOR_POD_TO_BE_REACHABLE",
}
