#!/bin/busybox sh
# The first program of a guest: says that it runs, then runs the lines it is sent.
# After each line it says how that ended, so that whoever drives the console can tell.
echo 'uvmm-guest: init'
/bin/busybox mkdir -p /proc /sys /dev /run /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ TERM=vt100
hostname uvmm-guest

# The power button: the kernel tells programs, and one must answer.
mkdir -p /etc/acpi/PWRF /var/log /var/run
printf '#!/bin/sh\npoweroff -f\n' > /etc/acpi/PWRF/00000080
chmod +x /etc/acpi/PWRF/00000080
(insmod /modules/evdev.ko && insmod /modules/button.ko && acpid) > /dev/null 2>&1 &

stty -echo 2>/dev/null
echo "uvmm-guest: ready on Linux $(uname -r); lines are run by sh, 'poweroff -f' ends"
while IFS= read -r line; do
    ( eval "$line" ) </dev/null
    echo "uvmm-guest: status $?"
done
poweroff -f
